"""Runs in a container: reads all files of its image in random order, again and again, and compares digests.

Before each file its pages are dropped from the page cache (POSIX_FADV_DONTNEED), so that the reads go to the layers'
devices. Arguments: a directory with `files.json`, path to SHA-256; how many threads; seconds of a slow read. Lines of JSON are appended to `record` in it; times
are CLOCK_MONOTONIC, in seconds. Ends when there is a file `stop`.
"""
import hashlib, json, os, random, sys, threading, time

DIRECTORY = sys.argv[1]
READERS = int(sys.argv[2])
# Reads that took more seconds are written down one by one.
SLOW = float(sys.argv[3])
CHUNK = 128 * 1024

with open(os.path.join(DIRECTORY, 'files.json')) as file:
    FILES = list(json.load(file).items())
RECORD = os.open(os.path.join(DIRECTORY, 'record'), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
begun = [0.0] * READERS  # when the operation under way began; 0: none is
count = {'files': 0, 'bytes': 0, 'errors': 0, 'wrong': 0}
lock = threading.Lock()


def say(**what):
    os.write(RECORD, (json.dumps(what) + '\n').encode())


def timed(number, operation, *arguments):
    start = begun[number] = time.monotonic()
    try:
        return operation(*arguments)
    finally:
        begun[number] = 0.0
        end = time.monotonic()
        if end - start > SLOW:
            say(event='slow', start=start, end=end)


def digest(number, path):
    sha256, length = hashlib.sha256(), 0
    descriptor = timed(number, os.open, path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        while chunk := timed(number, os.read, descriptor, CHUNK):
            sha256.update(chunk)
            length += len(chunk)
    finally:
        os.close(descriptor)
    return sha256.hexdigest(), length


def read(number):
    order = random.Random(number)
    files = FILES[:]
    while True:
        order.shuffle(files)
        for path, expected in files:
            if os.path.exists(os.path.join(DIRECTORY, 'stop')):
                return
            try:
                found, length = digest(number, path)
            except OSError as error:
                say(event='error', path=path, errno=error.errno, at=time.monotonic())
                with lock:
                    count['errors'] += 1
                time.sleep(0.1)
                continue
            if found != expected:
                say(event='wrong', path=path, found=found, expected=expected, at=time.monotonic())
            with lock:
                count['files'] += 1
                count['bytes'] += length
                count['wrong'] += found != expected


readers = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
for reader in readers:
    reader.start()
while any(reader.is_alive() for reader in readers):
    waiting = [start for start in begun if start > 0]
    say(event='progress', at=time.monotonic(), oldest=min(waiting, default=0), **count)
    time.sleep(0.1)
say(event='end', at=time.monotonic(), oldest=0, **count)
