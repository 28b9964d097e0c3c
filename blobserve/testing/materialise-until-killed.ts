/**
 * Materialises a layer, and kills itself before one of the steps. Arguments: the request in JSON, and how many bytes are written
 * then, or which step it is.
 */
import { materialise, type MaterialiseRequest } from '../materialise.js';

const [request = '', place = ''] = process.argv.slice(2);
materialise(JSON.parse(request) as MaterialiseRequest, (step) => {
  if (typeof step === 'number' ? step >= Number(place) : step === place) process.kill(process.pid, 'SIGKILL');
});
