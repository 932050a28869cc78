// Greedy decoding by llama.cpp, for export_exam.py: a line of JSON with a text in, a line with the token ids that follow out.
//     node llama_cpp.mjs FOLDER MODEL.gguf EOS NEW_TOKENS THREADS     (FOLDER: where `npm install node-llama-cpp` was run)
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, path, ...numbers] = process.argv.slice(2);
const [eos, newTokens, threads] = numbers.map(Number);
const { getLlama } = await import(pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: threads });
const model = await llama.loadModel({ modelPath: path });
const context = await model.createContext({ threads, flashAttention: false });
const sequence = context.getSequence();
const likeliest = { generateNext: { token: true, options: { temperature: 0 } } };
for await (const line of createInterface({ input: process.stdin })) {
  await sequence.clearHistory();
  const ids = [];
  let feed = model.tokenize(JSON.parse(line), true); // with its markers as tokens
  while (ids.length < newTokens && ids.at(-1) !== eos) {
    const drawn = await sequence.controlledEvaluate([...feed.slice(0, -1), [feed.at(-1), likeliest]]);
    ids.push(drawn.at(-1).next.token);
    feed = [ids.at(-1)];
  }
  console.log(JSON.stringify(ids));
}
process.exit(0);
