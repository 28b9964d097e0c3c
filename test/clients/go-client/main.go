// A client of containerd's Go library that pulls an image as nerdctl does on containerd 1.x: Client.Pull with a snapshotter
// and no handler that would add labels. What it sends with a Prepare is the chain ID alone.
//
//	go-client ADDRESS NAMESPACE SNAPSHOTTER pull REFERENCE
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/remotes/docker"
)

func main() {
	if len(os.Args) != 6 || os.Args[4] != "pull" {
		log.Fatal("usage: go-client ADDRESS NAMESPACE SNAPSHOTTER pull REFERENCE")
	}
	address, namespace, snapshotter, reference := os.Args[1], os.Args[2], os.Args[3], os.Args[5]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx = namespaces.WithNamespace(ctx, namespace)
	client, err := containerd.New(address)
	if err != nil {
		log.Fatalf("cannot reach containerd: %v", err)
	}
	defer client.Close()
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	image, err := client.Pull(ctx, reference,
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
		containerd.WithPullUnpack,
		containerd.WithPullSnapshotter(snapshotter),
	)
	if err != nil {
		log.Fatalf("cannot pull: %v", err)
	}
	fmt.Println(image.Target().Digest)
}
