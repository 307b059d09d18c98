// Talking to the server: requests that fail with a readable message, and a job's events.

/** Something the server said no to; `message` is meant for people. */
export class Refused extends Error {}

/** POST JSON and return the answer's JSON. Throws Refused. */
export async function post(path, body = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Refused("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response.json();
}

async function refusal(response) {
  try {
    return new Refused((await response.json()).error.message);
  } catch {
    return new Refused(`The server answered with status ${response.status}.`);
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
        if (event.type !== "text") return;
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
