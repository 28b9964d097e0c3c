// A client of containerd's Go library that does what nerdctl does on containerd 1.x. Its pull is Client.Pull with a
// snapshotter and no handler that would add labels: what it sends with a Prepare is the chain ID alone. Its commit makes an
// image of what a container has changed, without having the layers below.
//
//	go-client ADDRESS NAMESPACE SNAPSHOTTER pull REFERENCE
//	go-client ADDRESS NAMESPACE SNAPSHOTTER commit CONTAINER REFERENCE
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

const usage = "usage: go-client ADDRESS NAMESPACE SNAPSHOTTER pull REFERENCE | commit CONTAINER REFERENCE"

func main() {
	if len(os.Args) < 6 {
		log.Fatal(usage)
	}
	address, namespace, snapshotter, command := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx = namespaces.WithNamespace(ctx, namespace)
	client, err := containerd.New(address)
	if err != nil {
		log.Fatalf("cannot reach containerd: %v", err)
	}
	defer client.Close()
	switch {
	case command == "pull" && len(os.Args) == 6:
		err = pull(ctx, client, snapshotter, os.Args[5])
	case command == "commit" && len(os.Args) == 7:
		err = commit(ctx, client, snapshotter, os.Args[5], os.Args[6])
	default:
		log.Fatal(usage)
	}
	if err != nil {
		log.Fatalf("cannot %s: %v", command, err)
	}
}

func pull(ctx context.Context, client *containerd.Client, snapshotter, reference string) error {
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	image, err := client.Pull(ctx, reference,
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
		containerd.WithPullUnpack,
		containerd.WithPullSnapshotter(snapshotter),
	)
	if err != nil {
		return err
	}
	fmt.Println(image.Target().Digest)
	return nil
}
