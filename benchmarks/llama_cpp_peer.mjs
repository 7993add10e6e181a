// llama.cpp on the work of inference_throughput.py, through node-llama-cpp (npm install node-llama-cpp, prebuilt binaries).
// node llama_cpp_peer.mjs WORK.json MODEL.gguf PARALLEL: each prompt (token ids) is continued greedily by as many tokens
// as the specialist wrote for it, so that all peers do the same amount of work. Prints one JSON object.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const {getLlama} = await import(pathToFileURL(createRequire(process.cwd() + "/").resolve("node-llama-cpp")).href);
const [work, modelPath, parallel] = [JSON.parse(readFileSync(process.argv[2], "utf8")), process.argv[3], Number(process.argv[4])];
const threads = Number(process.env.OMP_NUM_THREADS ?? 2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const longest = Math.max(...work.prompts.map((prompt, i) => prompt.length + work.n_new[i]));
const context = await model.createContext({sequences: parallel, contextSize: longest + 8, batchSize: 512, threads});

async function write(sequence, prompt, nNew) {
    await sequence.clearHistory();
    let n = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
        if (++n >= nNew) break;
    return n;
}

const sequences = Array.from({length: parallel}, () => context.getSequence());
await write(sequences[0], work.prompts[0].slice(0, 20), 2);
let [next, nNew] = [0, 0];
const started = performance.now();
await Promise.all(sequences.map(async (sequence) => {
    while (next < work.prompts.length) {
        const i = next++;
        const n = await write(sequence, work.prompts[i], work.n_new[i]); // not `nNew += await`, which would read nNew before
        nNew += n;
    }
}));
const seconds = (performance.now() - started) / 1000;
const single = [];
for (const nNew of [Array(8).fill(1), work.n_new.slice(0, 8)]) { // SINGLE of inference_throughput.py
    const begun = performance.now();
    for (const [i, n] of nNew.entries()) await write(sequences[0], work.prompts[i], n);
    single.push((performance.now() - begun) / 1000);
}
console.log(JSON.stringify({seconds, n_new: nNew, single}));
process.exit(0);
