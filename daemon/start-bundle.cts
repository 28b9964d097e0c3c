/**
 * Starts a program from one file that holds all of its modules, with the bytecode that V8 made of it an earlier time: a data plane
 * that died is back in a third of the time that its three hundred modules take one by one, and readers wait for that.
 *
 * The code lies beside the bundle, in a file that names the bundle's content (`<bundle>.v8`), since V8 compares no more than the
 * length of the source. V8 itself refuses code of another version or of other options; the program is then compiled as usual.
 */
import fs = require('node:fs');
import modules = require('node:module');
import path = require('node:path');
import process = require('node:process');
import vm = require('node:vm');

/** What makes the code be written instead of used: the program does what it does for `--help`, which loads all of it. */
const WRITE = '--write-code-cache';

function readCode(file: string): Buffer | undefined {
  try {
    return fs.readFileSync(file);
  } catch {
    // Not written yet, or not for us: that costs time and nothing else.
    return undefined;
  }
}

/** Renamed into place whole: another process may be reading the one before. */
function writeCode(script: vm.Script, file: string): void {
  const partial = `${file}.${String(process.pid)}`;
  fs.writeFileSync(partial, script.createCachedData(), { mode: 0o644 });
  fs.renameSync(partial, file);
}

/**
 * @param bundle absolute path of a CommonJS module in ASCII
 * @throws what the bundle throws while it is loaded
 */
function startBundle(bundle: string): void {
  const codeFile = `${bundle}.v8`;
  const isWriting = process.argv[2] === WRITE;
  const code = isWriting ? undefined : readCode(codeFile);
  const script = new vm.Script(
    // On the first line, so that those of stack traces are the file's.
    `(function(exports,require,module,__filename,__dirname){${fs.readFileSync(bundle, 'latin1')}\n})`,
    {
      filename: bundle,
      ...(code === undefined ? {} : { cachedData: code }),
    },
  );
  if (isWriting) {
    process.argv.splice(2, process.argv.length, '--help');
    // When all that a start runs has been run: functions are compiled when they are first called.
    process.once('exit', () => writeCode(script, codeFile));
  }
  const exported = { exports: {} };
  type Wrapper = (
    exports: object,
    require: NodeJS.Require,
    module: object,
    file: string,
    directory: string,
  ) => void;
  (script.runInThisContext() as Wrapper)(
    exported.exports,
    modules.createRequire(bundle),
    exported,
    bundle,
    path.dirname(bundle),
  );
}

export = { startBundle };
