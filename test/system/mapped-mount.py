"""
Mounts an overlay of mapped layers as containerd 2.3 and later does (core/mount/mount_linux.go, mount_idmapped_linux.go):

    mapped-mount.py TARGET OPTION...
"""
import ctypes, os, sys

OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH = 1, 0o2000000, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_IDMAP, MS_PRIVATE, CLONE_NEWUSER = 1, 0x100000, 1 << 18, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def user_namespace(uids, gids):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        check(libc.unshare(CLONE_NEWUSER))
        os.write(ready[1], b'.')
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    for name, mapping in (('uid_map', uids), ('gid_map', gids)):
        with open(f'/proc/{child}/{name}', 'w') as file:
            file.write(mapping.replace(':', ' ').replace(',', '\n'))
    namespace = os.open(f'/proc/{child}/ns/user', os.O_RDONLY)
    os.write(go[1], b'.')
    os.waitpid(child, 0)
    return namespace


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ('attr_set', 'attr_clr', 'propagation', 'userns_fd')]


target, options = sys.argv[1], sys.argv[2:]
given = dict(option.split('=', 1) for option in options if '=' in option)
uids, gids, lower = given['uidmap'], given['gidmap'], given['lowerdir'].split(':')
common = os.path.dirname(os.path.commonprefix(lower))
clone = target + '.clone'
os.mkdir(clone)
tree = check(libc.syscall(OPEN_TREE, AT_FDCWD, common.encode(),
                          OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE))
attr = MountAttr(MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, user_namespace(uids, gids))
check(libc.syscall(MOUNT_SETATTR, tree, b'', AT_EMPTY_PATH | AT_RECURSIVE, ctypes.byref(attr), ctypes.sizeof(attr)))
check(libc.syscall(MOVE_MOUNT, tree, b'', AT_FDCWD, clone.encode(), MOVE_MOUNT_F_EMPTY_PATH))
try:
    rest = [option for option in options if not option.startswith(('lowerdir=', 'uidmap=', 'gidmap='))]
    mapped = ':'.join(clone + one[len(common):] for one in lower)
    check(libc.mount(b'overlay', target.encode(), b'overlay', 0, ','.join(rest + ['lowerdir=' + mapped]).encode()))
finally:
    os.system(f'umount -R -l {clone}')
    os.rmdir(clone)
