// Speaks to the server. Addresses are relative, so that the page also works below a path of a proxy.

const HERE = location.origin + location.pathname; // without a name and key, which fetch refuses in an address

// What the server refused, or what became of the connection, as a sentence for the reader.
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const SENTENCES = {
  400: "The server refused the request",
  401: "The server wants an API key, and this one is missing or wrong",
  403: "The server does not answer pages from this address",
  404: "The server has no such route",
  413: "The conversation is too long for the server",
  429: "The server has as many requests as it takes",
  503: "The server is not ready",
};

async function problemOf(response) {
  let detail = "";
  try {
    detail = (await response.json()).error?.message ?? "";
  } catch {
    detail = ""; // the body was no JSON, and the status says what there is to say
  }
  const sentence = SENTENCES[response.status] ?? "The server failed";
  const wait = Number(response.headers.get("Retry-After"));
  const later = wait > 0 ? ` It asks for ${wait} second${wait === 1 ? "" : "s"} of patience.` : "";
  const told = detail ? `: ${detail.replace(/\.?$/, ".")}` : ".";
  return new Problem(`${sentence} (${response.status})${told}${later}`, response.status);
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, HERE), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached; it may have stopped, or the network is down.");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

export async function read(path, key) {
  return (await request(path, key)).json();
}

// Yields the data of each server-sent event.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

// Yields the chunks of a streamed answer. Throws a Problem where it breaks off.
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(`The answer was broken off: ${chunk.error.message}`);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The connection broke off in the middle of the answer.");
  }
  throw new Problem("The connection broke off before the answer was complete.");
}
