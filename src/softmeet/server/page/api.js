// The server's API, as any client uses it: the models, and answers as streams of events.

const NAME = (name) => `softmeet-${name}`;

/** What outlives a reload, but not the browser's tab. */
export const kept = {
  get: (name) => JSON.parse(sessionStorage.getItem(NAME(name)) ?? 'null'),
  set: (name, value) => {
    try {
      sessionStorage.setItem(NAME(name), JSON.stringify(value));
    } catch {
      sessionStorage.removeItem(NAME(name)); // there is no more room
    }
  },
};

/** The API key. */
export const key = { get: () => kept.get('key') ?? '', set: (value) => kept.set('key', value) };

/** An error that the server told, or that it could not be reached. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function asked(path, options = {}) {
  const headers = { ...(options.body ? { 'content-type': 'application/json' } : {}) };
  // A header's characters are bytes.
  const bytes = [...new TextEncoder().encode(key.get())];
  if (bytes.length) headers.authorization = `Bearer ${bytes.map((byte) => String.fromCharCode(byte)).join('')}`;
  let answer;
  try {
    // Without a name and a key that the page's own address may have.
    answer = await fetch(new URL(`..${path}`, location.origin + location.pathname), { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('the server cannot be reached: is it still running?');
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const error = told.error ?? {};
  throw new ApiError(error.message ?? `the server answered ${answer.status}`, answer.status, error.code);
}

/** The served ensembles. */
export const models = async () => (await (await asked('/v1/models')).json()).data;

/** Post a body, and return the answer's document. */
export async function posted(path, body, signal) {
  return (await asked(path, { method: 'POST', body: JSON.stringify(body), signal })).json();
}

/** Post a body, and give each event of the answer's stream. */
export async function* streamed(path, body, signal) {
  const answer = await asked(path, { method: 'POST', body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ApiError('the answer broke off: the server has gone');
    }
    if (part.done) throw new ApiError('the answer broke off: the server has gone');
    held += part.value;
    const events = held.split('\n\n');
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, '');
      if (data === '[DONE]') return;
      const told = JSON.parse(data);
      if (told.error) throw new ApiError(told.error.message, 0, told.error.code);
      yield told;
    }
  }
}
