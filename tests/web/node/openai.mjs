// OpenAI's own SDK for Node.

import OpenAI from "openai";
import { run } from "./seen.mjs";

const messages = [{ role: "user", content: "Hi" }];
const clients = {};
const client = (url) => (clients[url] ??= new OpenAI({ baseURL: `${url}/v1`, apiKey: "key-of-a-client", maxRetries: 0 }));

function ways(url) {
  const { chat, responses, completions } = client(url);
  return {
    "openai-chat": (model) => chat.completions.create({ model, messages, stream: true }),
    "openai-responses": (model) => responses.create({ model, input: "Hi", stream: true }),
    "openai-completions": (model) => completions.create({ model, prompt: "Hi", stream: true }),
    whole: async (model) => [await chat.completions.create({ model, messages })],
    models: async () => [(await client(url).models.list()).data.map((model) => model.id)],
  };
}

async function abort(url, model) {
  const stream = await ways(url)["openai-chat"](model);
  for await (const chunk of stream) {
    stream.controller.abort();
    return chunk.choices.length;
  }
}

await run(ways, abort);
