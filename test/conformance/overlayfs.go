// Serves containerd's own overlayfs snapshotter over a socket, as containerd reaches a proxy plugin: what ours is held
// against.
//
//	overlayfs SOCKET ROOT
package main

import (
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: overlayfs SOCKET ROOT")
	}
	snapshotter, err := overlay.NewSnapshotter(os.Args[2], overlay.AsynchronousRemove)
	if err != nil {
		log.Fatalf("cannot open the overlayfs snapshotter: %v", err)
	}
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		log.Fatalf("cannot listen: %v", err)
	}
	server := grpc.NewServer()
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		server.Stop()
	}()
	if err := server.Serve(listener); err != nil {
		log.Fatalf("cannot serve: %v", err)
	}
	if err := snapshotter.Close(); err != nil {
		log.Fatalf("cannot close the overlayfs snapshotter: %v", err)
	}
}
