/**
 * Commands run one after the other as root of a machine that has never seen this software: with process and mount namespaces
 * of their own, in which /etc and /opt are copies on write, and /run, /var/lib, /mnt and the home directory are empty. Whatever they
 * start ends with them, and nothing of this machine is changed.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';

export interface Step {
  readonly command: string;
  /** It stays in the foreground: the next step begins when it serves. */
  readonly daemon: boolean;
  readonly workingDirectory: string;
}

export interface Outcome {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface CleanRoot {
  /** An empty directory for all that is written. */
  readonly directory: string;
  /** What PATH begins with. */
  readonly programs: readonly string[];
  /** Files that are there before the first step, by their paths. */
  readonly files: Readonly<Record<string, string>>;
  /** Run before the first step, in the clean root. */
  readonly prepare: string;
  readonly timeoutMs: number;
}

const PRELUDE = `
for name in etc opt; do
  mkdir -p "$D/$name"; mount -t tmpfs tmpfs "$D/$name"; mkdir "$D/$name/upper" "$D/$name/work"
  mount -t overlay overlay -o "lowerdir=/$name,upperdir=$D/$name/upper,workdir=$D/$name/work" "/$name"
done
for name in run var/lib mnt; do mkdir -p "$D/root/$name"; mount --bind "$D/root/$name" "/$name"; done
export HOME="$D/home"; mkdir "$HOME"
unset XDG_CACHE_HOME CONTAINERD_ADDRESS CONTAINERD_NAMESPACE
daemon=
end_daemon() { if [ -n "$daemon" ]; then kill "$daemon"; wait "$daemon" || true; daemon=; fi; }
wait_for() { for i in $(seq 600); do [ -S "$1" ] && return; sleep 0.1; done; echo "$1 does not appear" >&2; exit 1; }
begin_daemon() {
  end_daemon
  (eval "exec $1") >>"$D/daemon.log" 2>&1 </dev/null & daemon=$!
  wait_for /run/erofs-nbd/snapshotter.sock; wait_for /var/lib/erofs-nbd/blobserve.sock
}
run() { # NUMBER DIRECTORY
  set +e; (cd "$2" && . "$D/step-$1.sh") >"$D/step-$1.out" 2>"$D/step-$1.err" </dev/null; echo $? >"$D/step-$1.code"; set -e
}
`;

/** @returns how each step ended, in their order; fewer when one has ended them all */
export async function runInCleanRoot(root: CleanRoot, steps: readonly Step[]): Promise<Outcome[]> {
  const { directory } = root;
  const lines = [
    'set -eu',
    `D=${quoted(directory)}`,
    `export PATH=${quoted(root.programs.join(':'))}:"$PATH"`,
    PRELUDE,
  ];
  for (const [file, text] of Object.entries(root.files)) {
    const copy = path.join(directory, 'files', file);
    await mkdir(path.dirname(copy), { recursive: true });
    await writeFile(copy, text);
    lines.push(`mkdir -p ${quoted(path.dirname(file))}; cp ${quoted(copy)} ${quoted(file)}`);
  }
  lines.push(root.prepare);
  for (const [number, { command, daemon, workingDirectory }] of steps.entries()) {
    await writeFile(path.join(directory, `step-${number}.sh`), `${command}\n`);
    // `end_daemon` is ours and has to change this shell.
    if (daemon)
      lines.push(
        `cd ${quoted(workingDirectory)}; begin_daemon ${quoted(command)}; echo 0 >"$D/step-${number}.code"`,
      );
    else if (command === 'end_daemon') lines.push(`end_daemon; echo 0 >"$D/step-${number}.code"`);
    else lines.push(`run ${number} ${quoted(workingDirectory)}`);
  }
  const script = path.join(directory, 'session.sh');
  await writeFile(script, `${lines.join('\n')}\n`);
  const session = await execa(
    'unshare',
    ['--mount', '--propagation', 'slave', '--pid', '--fork', '--kill-child', '--mount-proc', 'bash', script],
    { stdin: 'ignore', reject: false, timeout: root.timeoutMs, all: true },
  );
  const outcomes: Outcome[] = [];
  for (const number of steps.keys()) {
    const said = (ending: string): Promise<string> =>
      readFile(path.join(directory, `step-${number}.${ending}`), 'utf8').catch(() => '');
    const code = await said('code');
    if (code === '') break;
    outcomes.push({ code: Number(code), stdout: await said('out'), stderr: await said('err') });
  }
  if (session.exitCode !== 0 || outcomes.length < steps.length) {
    const log = await readFile(path.join(directory, 'daemon.log'), 'utf8').catch(() => '');
    throw new Error(
      `the session ended with ${String(session.exitCode)} at step ${outcomes.length}, ` +
        `${JSON.stringify(steps[outcomes.length]?.command)}: ${session.all}\n${log.slice(-3000)}`,
    );
  }
  return outcomes;
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
