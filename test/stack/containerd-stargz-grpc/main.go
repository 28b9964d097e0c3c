// containerd-stargz-grpc: Debian packages all of stargz-snapshotter's daemon but its main function. This is that function, with
// what a daemon without IPFS and without credentials has of it: upstream's defaults, and the same options.
package main

import (
	"context"
	"flag"
	golog "log"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/log"
	"github.com/containerd/stargz-snapshotter/fs"
	memorymetadata "github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
)

var (
	address  = flag.String("address", "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock", "address of the gRPC server")
	settings = flag.String("config", "", "configuration file; without it, the defaults")
	logLevel = flag.String("log-level", logrus.InfoLevel.String(), "trace, debug, info, warn, error, fatal or panic")
	root     = flag.String("root", "/var/lib/containerd-stargz-grpc", "directory of this snapshotter")
)

func main() {
	flag.Parse()
	ctx := log.WithLogger(context.Background(), log.L)
	must := func(doing string, err error) {
		if err != nil {
			log.G(ctx).WithError(err).Fatal(doing)
		}
	}
	level, err := logrus.ParseLevel(*logLevel)
	must("log level", err)
	logrus.SetLevel(level)
	logrus.SetFormatter(&logrus.JSONFormatter{TimestampFormat: log.RFC3339NanoFixed})
	// go-fuse writes to the standard library's log.
	golog.SetOutput(log.G(ctx).WriterLevel(logrus.DebugLevel))

	var config service.Config
	if *settings != "" {
		tree, err := toml.LoadFile(*settings)
		must("configuration", err)
		must("configuration", tree.Unmarshal(&config))
	}
	must("this system", service.Supported(*root))
	snapshotter, err := service.NewStargzSnapshotterService(ctx, *root, &config,
		service.WithFilesystemOptions(fs.WithMetricsLogLevel(logrus.InfoLevel), fs.WithMetadataStore(memorymetadata.NewReader)))
	must("snapshotter", err)

	rpc := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(rpc, snapshotservice.FromSnapshotter(snapshotter))
	must("an earlier socket", os.RemoveAll(*address))
	listener, err := net.Listen("unix", *address)
	must("socket", err)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() { must("serving", rpc.Serve(listener)) }()
	// As upstream: only SIGINT unmounts what is served.
	if <-signals == syscall.SIGINT {
		must("closing", snapshotter.Close())
	}
}
