// The same SDK asked twice, at the provider and at the gateway: prints what its program sees of either, as one line of JSON.

const job = JSON.parse(process.argv[2]);

/** What a program sees of an answer: its pieces, and the exception that ended it, if one did. */
async function seen(pieces) {
  const gathered = [];
  try {
    for await (const piece of await pieces()) gathered.push(piece);
  } catch (error) {
    gathered.push(told(error));
  }
  return gathered;
}

export function told(error) {
  const { status, statusCode, code, type } = error;
  return [error.constructor.name, error.message, status ?? statusCode ?? null, code ?? null, type ?? null];
}

/** Ask for every model by its way of asking, at both addresses; then begin one answer here, and leave it. */
export async function run(ways, abort) {
  const found = { there: {}, here: {} };
  for (const place of ["there", "here"]) {
    for (const [way, models] of Object.entries(job.models)) {
      for (const model of models) found[place][`${way} ${model}`] = await seen(() => ways(job[place])[way](model));
    }
  }
  found.aborted = [];
  for (const model of job.abort) found.aborted.push(await abort(job.here, model));
  console.log(JSON.stringify(found));
}
