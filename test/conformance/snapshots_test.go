// containerd's own test suite for snapshotters, against one that listens on a socket. It runs twice: over the client that
// containerd uses for a proxy plugin, and below containerd's metadata store, whose keys have a namespace in front and
// whose garbage collector decides what is removed. Every test ends with everything removed, and fails when something is
// left: a snapshot, a directory of one, a mount.
//
//	CONFORMANCE_SOCKET  where the snapshotter listens
//	CONFORMANCE_ROOT    its root, with one directory per snapshot below `snapshots`
//	CONFORMANCE_PLUGIN  the name by which containerd would call it
//
// All tests share one snapshotter, and some list what it holds: run them one after the other (-test.parallel 1).
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/metadata"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"github.com/moby/sys/mountinfo"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

func setting(t *testing.T, name string) string {
	value := os.Getenv(name)
	if value == "" {
		t.Fatalf("%s is not set", name)
	}
	return value
}

func connect(t *testing.T) snapshots.Snapshotter {
	connection, err := grpc.Dial("unix://"+setting(t, "CONFORMANCE_SOCKET"), grpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	return proxy.NewSnapshotter(api.NewSnapshotsClient(connection), setting(t, "CONFORMANCE_PLUGIN"))
}

func TestProxy(t *testing.T) {
	backend, root := connect(t), setting(t, "CONFORMANCE_ROOT")
	testsuite.SnapshotterSuite(t, "proxy",
		func(ctx context.Context, directory string) (snapshots.Snapshotter, func() error, error) {
			return backend, func() error {
				return all(
					unmountBelow(filepath.Dir(directory)),
					removeAll(ctx, backend),
					checkEmpty(ctx, backend, root),
				)
			}, nil
		})
}

func TestMetadata(t *testing.T) {
	backend, root, plugin := connect(t), setting(t, "CONFORMANCE_ROOT"), setting(t, "CONFORMANCE_PLUGIN")
	testsuite.SnapshotterSuite(t, "metadata",
		func(ctx context.Context, directory string) (snapshots.Snapshotter, func() error, error) {
			database, err := bolt.Open(filepath.Join(directory, "meta.db"), 0o600, nil)
			if err != nil {
				return nil, nil, err
			}
			store := metadata.NewDB(database, nil, map[string]snapshots.Snapshotter{plugin: backend})
			return store.Snapshotter(plugin), func() error {
				// Removing there only forgets; what nobody remembers is removed by the collector.
				err := all(unmountBelow(filepath.Dir(directory)), removeAll(ctx, store.Snapshotter(plugin)))
				if _, collecting := store.GarbageCollect(ctx); err == nil {
					err = collecting
				}
				return all(err, checkEmpty(ctx, backend, root), database.Close())
			}, nil
		})
}

// removeAll removes every snapshot, children before their parents. It lists them once: below the metadata store a list
// is a Stat of each.
func removeAll(ctx context.Context, snapshotter snapshots.Snapshotter) error {
	parent, children := map[string]string{}, map[string]int{}
	err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		parent[info.Name] = info.Parent
		children[info.Parent]++
		return nil
	})
	if err != nil {
		return fmt.Errorf("list what is to be removed: %w", err)
	}
	removed := 0
	for name := range parent {
		// Up from each that has no children, as far as it was the last one.
		for name != "" && children[name] == 0 {
			if err := snapshotter.Remove(ctx, name); err != nil {
				return fmt.Errorf("remove %q: %w", name, err)
			}
			removed++
			above := parent[name]
			children[name] = -1
			children[above]--
			name = above
		}
	}
	if removed != len(parent) {
		return fmt.Errorf("%d of %d snapshots have a child that is not listed", len(parent)-removed, len(parent))
	}
	return nil
}

// checkEmpty complains of snapshots and of directories that are left after a Cleanup.
func checkEmpty(ctx context.Context, snapshotter snapshots.Snapshotter, root string) error {
	cleaner, ok := snapshotter.(snapshots.Cleaner)
	if !ok {
		return errors.New("the client has no Cleanup")
	}
	if err := cleaner.Cleanup(ctx); err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	var left []string
	err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		left = append(left, info.Name)
		return nil
	})
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		left = append(left, filepath.Join(root, "snapshots", entry.Name()))
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return nil
}

// unmountBelow unmounts what a test has left mounted, since its directory is removed next, and complains of it.
func unmountBelow(directory string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(directory))
	if err != nil {
		return err
	}
	var left []string
	for i := len(mounts) - 1; i >= 0; i-- {
		point := mounts[i].Mountpoint
		left = append(left, point)
		if err := mount.UnmountAll(point, 0); err != nil {
			return err
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left mounted: %s", strings.Join(left, ", "))
	}
	return nil
}

// all returns the first error.
func all(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
