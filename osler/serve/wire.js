// How the chat page speaks with the server that sent it: JSON, server-sent events, the key, and refusals as sentences.

const API_KEY = "osler-api-key"; // kept in the tab

class Refusal extends Error {}

async function request(path, body, signal) {
  const key = sessionStorage.getItem(API_KEY);
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is `osler serve` still running?");
  }
  if (response.status === 401) {
    await askForKey(key ? "The server did not accept the key." : "Whoever started the server knows it.");
    return request(path, body, signal);
  }
  if (!response.ok) throw new Refusal(await explain(response));
  return response;
}

async function explain(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch (error) {
    // not from our server, or cut
  }
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 429) said ||= "The server is busy.";
  return (said || `The server answered with status ${response.status} and no reason.`) + (wait ? ` Try again in ${seconds(wait)}.` : "");
}

function askForKey(why) {
  $("key-why").textContent = why;
  $("key").showModal();
  return new Promise((resolve, reject) => {
    $("key").onclose = () => {
      if ($("key").returnValue !== "ok") return reject(new Refusal("The server wants an API key, and none was given."));
      sessionStorage.setItem(API_KEY, $("key-entry").value);
      $("key-entry").value = $("key").returnValue = "";
      resolve();
    };
  });
}

// Yields the JSON objects of a stream of server-sent events, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Refusal("The connection broke off in the middle of the reply. What had come is shown.");
    const lines = (text + part.value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(event.error.message);
      yield event;
    }
  }
}
