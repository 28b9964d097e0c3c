/** The option that says which platform of an image is meant. */
import { InvalidArgumentError, Option } from 'commander';
import {
  formatPlatform,
  machinePlatform,
  parsePlatform,
  type Platform,
} from '../blobserve/registry/platform.js';

/** Its value is a {@link Platform}; default: this machine's. */
export function platformOption(): Option {
  return new Option('--platform <os/architecture[/variant]>', 'of which platform')
    .argParser(toPlatform)
    .default(machinePlatform(), "this machine's");
}

function toPlatform(text: string): Platform {
  try {
    return parsePlatform(text);
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message);
  }
}

/** Empty: that of this machine, as the daemons say it among themselves. */
export function platformText(platform: Platform): string {
  const text = formatPlatform(platform);
  return text === formatPlatform(machinePlatform()) ? '' : text;
}
