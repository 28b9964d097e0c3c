package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/diff"
	"github.com/containerd/containerd/images"
	"github.com/containerd/containerd/platforms"
	"github.com/containerd/containerd/rootfs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// commit does what nerdctl's does (pkg/imgutil/commit): the difference of the container's snapshot as a layer, a
// configuration and a manifest with one layer more, a snapshot of that layer on the image's, the image.
func commit(ctx context.Context, client *containerd.Client, snapshotter, id, reference string) error {
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer done(ctx)
	container, err := client.ContainerService().Get(ctx, id)
	if err != nil {
		return err
	}
	image, err := client.GetImage(ctx, container.Image)
	if err != nil {
		return err
	}
	store, service := client.ContentStore(), client.SnapshotService(snapshotter)
	layer, err := rootfs.CreateDiff(ctx, container.SnapshotKey, service, client.DiffService(),
		diff.WithMediaType(ocispec.MediaTypeImageLayerGzip))
	if err != nil {
		return fmt.Errorf("make the layer: %w", err)
	}
	info, err := store.Info(ctx, layer.Digest)
	if err != nil {
		return err
	}
	diffID, err := digest.Parse(info.Labels["containerd.io/uncompressed"])
	if err != nil {
		return err
	}

	manifest, err := images.Manifest(ctx, store, image.Target(), platforms.Default())
	if err != nil {
		return err
	}
	blob, err := content.ReadBlob(ctx, store, manifest.Config)
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := json.Unmarshal(blob, &config); err != nil {
		return err
	}
	below := identity.ChainID(config.RootFS.DiffIDs).String()
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	chain := identity.ChainID(config.RootFS.DiffIDs).String()

	if err := apply(ctx, client, snapshotter, layer, chain, below); err != nil {
		return fmt.Errorf("unpack the layer: %w", err)
	}
	configuration, err := write(ctx, store, ocispec.MediaTypeImageConfig, config, map[string]string{
		"containerd.io/gc.ref.snapshot." + snapshotter: chain,
	})
	if err != nil {
		return err
	}
	layers := append(manifest.Layers, layer)
	labels := map[string]string{"containerd.io/gc.ref.content.0": configuration.Digest.String()}
	for i, one := range layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.%d", i+1)] = one.Digest.String()
	}
	target, err := write(ctx, store, ocispec.MediaTypeImageManifest, struct {
		MediaType string `json:"mediaType"`
		ocispec.Manifest
	}{ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		Config:    configuration,
		Layers:    layers,
	}}, labels)
	if err != nil {
		return err
	}
	_, err = client.ImageService().Create(ctx, images.Image{Name: reference, Target: target})
	return err
}

func apply(ctx context.Context, client *containerd.Client, snapshotter string, layer ocispec.Descriptor,
	chain, below string) error {
	service, key := client.SnapshotService(snapshotter), "commit "+chain
	mounts, err := service.Prepare(ctx, key, below)
	if err != nil {
		return err
	}
	if _, err := client.DiffService().Apply(ctx, layer, mounts); err != nil {
		service.Remove(ctx, key)
		return err
	}
	return service.Commit(ctx, chain, key)
}

func write(ctx context.Context, store content.Store, mediaType string, value any, labels map[string]string) (
	ocispec.Descriptor, error) {
	blob, err := json.Marshal(value)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	descriptor := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	return descriptor, content.WriteBlob(ctx, store, descriptor.Digest.String(), bytes.NewReader(blob), descriptor,
		content.WithLabels(labels))
}
