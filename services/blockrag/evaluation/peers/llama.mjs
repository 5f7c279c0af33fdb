// llama.cpp, through node-llama-cpp, as a peer: see workers.py for what it reads and answers.
//
// node llama.mjs NODE_LLAMA_CPP_FOLDER GGUF THREADS
import { createInterface } from "node:readline";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, modelPath, threads] = process.argv.slice(2);
const { getLlama, getModuleVersion } = await import(pathToFileURL(join(resolve(folder), "dist", "index.js")).href);
const answer = (said) => process.stdout.write(JSON.stringify(said) + "\n");
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads) });
const model = await llama.loadModel({ modelPath });

// One context at a time, as large as it must be.
let current = { count: 0, size: 0 };
async function sequences(count, size) {
  if (current.count !== count || current.size < size) {
    await current.context?.dispose();
    const context = await model.createContext({
      contextSize: size, sequences: count, threads: Number(threads), batchSize: 512, flashAttention: true,
    });
    current = { count, size, context, all: Array.from({ length: count }, () => context.getSequence()) };
  }
  return current.all;
}

async function stream(sequence, prompt, state, newTokens, start) {
  const kept = state === "again" ? prompt.blocks.reduce((sum, block) => sum + block.length, 0) : 0;
  if (sequence.nextTokenIndex > kept)
    await sequence.eraseContextTokenRanges([{ start: kept, end: sequence.nextTokenIndex }]);
  if (sequence.nextTokenIndex !== kept) throw new Error(`${sequence.nextTokenIndex} tokens kept, ${kept} wanted`);
  const tokens = [...prompt.blocks.flat(), ...prompt.question].slice(kept);
  const times = [];
  start.at ??= performance.now();
  for await (const _ of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
    times.push(performance.now());
    if (times.length === newTokens) break;
  }
  return times;
}

answer({ ready: `node-llama-cpp ${await getModuleVersion()}, flash attention` });
for await (const line of createInterface({ input: process.stdin })) {
  const { stream_prompts: prompts, state, new_tokens: newTokens } = JSON.parse(line);
  try {
    const longest = Math.max(...prompts.map(({ blocks, question }) => blocks.flat().length + question.length));
    const all = await sequences(prompts.length, Math.ceil((longest + newTokens) / 256 + 1) * 256);
    const start = {};
    const times = await Promise.all(prompts.map((prompt, number) => stream(all[number], prompt, state, newTokens, start)));
    const first = Math.max(...times.map((of) => of[0]));
    const last = Math.min(...times.map((of) => of.at(-1) - of[0]));
    if (times.some((of) => of.length < newTokens)) throw new Error("an answer ended early");
    answer({ first_ms: first - start.at, token_ms: last / (newTokens - 1) });
  } catch (error) {
    answer({ error: `${error}` });
  }
}
process.exit(0);
