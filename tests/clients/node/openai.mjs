// The official client against the fake engine's server; prints what it understood as JSON.
// node openai.mjs BASE CHAT_MODEL EMBEDDING_MODEL
import OpenAI from "openai";

const [baseURL, model, embedder] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const found = {};

found.models = (await client.models.list()).data.map((card) => card.id);
found.model = (await client.models.retrieve(model)).id;

const plain = await client.chat.completions.create({ model, messages, logprobs: true });
found.chat = plain.choices[0].message.content;
found.finish = plain.choices[0].finish_reason;
found.total = plain.usage.total_tokens;
found.logprobs = plain.choices[0].logprobs.content.length;

found.streamed = "";
const stream = await client.chat.completions.create({
  model,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) found.streamedTotal = chunk.usage.total_tokens;
}

const helper = client.chat.completions.stream({ model, messages });
found.helper = await helper.finalContent();

found.completion = "";
const texts = await client.completions.create({ model, prompt: "a", max_tokens: 99, stream: true });
for await (const chunk of texts) found.completion += chunk.choices[0].text;

const input = ["a", "b"];
const asked = { model: embedder, input };
const decoded = await client.embeddings.create(asked); // asks for base64 and decodes it
const floats = await client.embeddings.create({ ...asked, encoding_format: "float" });
found.embeddings = decoded.data.map((item) => item.embedding);
found.floats = floats.data.map((item) => item.embedding);

const { response, data } = await client.chat.completions.create({ model, messages }).withResponse();
found.raw = [response.status, response.headers.get("x-request-id") !== null, data.model];

async function thrown(call) {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.param, error.type];
  }
  return null;
}
found.notFound = await thrown(() => client.chat.completions.create({ model: "none", messages }));
found.badRequest = await thrown(() =>
  client.chat.completions.create({ model, messages, temperature: 3 }),
);
console.log(JSON.stringify(found));
