// Talking to the server: requests that fail with a readable message, and a job's events.

/** Something the server said no to; `message` is meant for people, `status` is 0 when there was no answer at all. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(method, path, body) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Refused("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** JSON there and back. All throw Refused. */
export const get = (path) => request("GET", path);
export const post = (path, body = {}) => request("POST", path, body);
export const patch = (path, body) => request("PATCH", path, body);
export const remove = (path) => request("DELETE", path);

/** The address of a conversation for the scripts. */
export function at(id, rest = "") {
  return `/chat/conversations/${encodeURIComponent(id)}${rest}`;
}

async function refusal(response) {
  try {
    const { message, code } = (await response.json()).error;
    if (code === "invalid_api_key") location.reload(); // the session has ended: the server asks for a key again
    return new Refused(message, response.status);
  } catch {
    return new Refused(`The server answered with status ${response.status}.`, response.status);
  }
}

/**
 * The events of a job, from the first on. A lost connection is taken up again behind the last event seen, with
 * growing pauses; after six failures in a row it is given up. Throws Refused; ends silently when `signal` aborts.
 */
export async function* follow(id, signal) {
  let after = 0;
  for (let failures = 0; failures < 6; failures++) {
    try {
      const response = await fetch(`/chat/jobs/${encodeURIComponent(id)}/events?after=${after}`, { signal });
      if (!response.ok) throw await refusal(response);
      for await (const event of lines(response.body)) {
        after = event.n;
        failures = 0;
        yield event;
        if (event.type === "done" || event.type === "error") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 200 * 2 ** failures));
    if (signal.aborted) return;
  }
  throw new Refused("The connection to the server was lost.");
}

/** The JSON objects of a body with one per line; empty lines only keep the connection alive. */
async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = parts.pop();
    for (const line of parts) if (line) yield JSON.parse(line);
  }
}
