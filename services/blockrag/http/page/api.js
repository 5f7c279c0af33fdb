// The system's own HTTP API, which every other client uses too; the key stays in this tab.

const KEY = "blockrag.key";
const BASE = new URL("v1/", document.baseURI);

let askForKey = async () => null;

/** `ask(problem)` resolves when a key was given; it is called whenever the system wants one. */
export function whenKeyIsMissing(ask) {
  askForKey = ask;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export class ApiError extends Error {
  constructor(status, detail) {
    super(detail?.message ?? `The system answered ${status}.`);
    this.status = status;
    this.code = detail?.code ?? "";
  }
}

const headers = () => (hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {});

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  return new ApiError(response.status, body.error);
}

/** The response. Asks for a key, and again, for as long as that is what is missing. */
async function call(method, path, { body, signal } = {}) {
  for (;;) {
    const sent = { method, signal, headers: headers() };
    if (body !== undefined) {
      sent.headers["Content-Type"] = "application/json";
      sent.body = JSON.stringify(body);
    }
    let response;
    try {
      response = await fetch(new URL(path, BASE), sent);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The system cannot be reached." });
    }
    if (response.ok) return response;
    const error = await problem(response);
    if (error.status !== 401) throw error;
    await askForKey(hasKey() ? error.message : "");
  }
}

export const get = async (path, options) => (await call("GET", path, options)).json();
export const post = async (path, body, options) => (await call("POST", path, { ...options, body })).json();
export const remove = async (path) => (await call("DELETE", path)).json();

/** The objects of an answer in server-sent events. */
export async function* events(path, body, signal) {
  const response = await call("POST", path, { body, signal });
  const decoder = new TextDecoder();
  let rest = "";
  for await (const piece of pieces(response.body)) {
    rest += decoder.decode(piece, { stream: true });
    const whole = rest.split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data && data !== "data: [DONE]") yield checked(JSON.parse(data.slice(6)));
    }
  }
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function checked(event) {
  if (event.type === "error") throw new ApiError(200, event);
  if (event.error && event.type === undefined) throw new ApiError(200, event.error);
  return event;
}

/** Uploads a file; `progress(share)` as it goes, which fetch cannot tell. */
export async function upload(collection, file, progress) {
  for (;;) {
    const { status, body } = await send(collection, file, progress);
    if (status >= 200 && status < 300) return body;
    const error = new ApiError(status, body?.error);
    if (status !== 401) throw error;
    await askForKey(hasKey() ? error.message : "");
  }
}

function send(collection, file, progress) {
  const form = new FormData();
  form.append("file", file);
  const request = new XMLHttpRequest();
  request.open("POST", new URL(`vector_stores/${encodeURIComponent(collection)}/files`, BASE));
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  request.responseType = "json";
  request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
  return new Promise((resolve, reject) => {
    request.onload = () => resolve({ status: request.status, body: request.response });
    request.onerror = () => reject(new ApiError(0, { message: "The system cannot be reached." }));
    request.send(form);
  });
}
