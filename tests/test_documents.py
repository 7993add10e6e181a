"""The documents: every block runs, as written or by a marked stand-in; what they name exists; what they show
is what the code prints.

    python tests/test_documents.py      # lists the blocks, and how each is tested

A mark is an HTML comment above a block, which readers do not see:

    <!-- run: options -->               parse the options of our scripts in it, no more
    <!-- run: make -n -->               ask make what it would do
    <!-- run: no, REASON -->            another machine or program; the options of our scripts are parsed
    <!-- run: exit 2 -->                its last command ends with this status
    <!-- run: with A => B; C => D -->   replace these texts first
    <!-- run: output of COMMAND -->     lines of that command's output in this order, numbers aside
    <!-- run: figures of COMMAND -->    the same, numbers too
    <!-- run: figures -->               console: compare numbers too
    <!-- run: model text -->            console: compare messages alone, not what a model wrote
    <!-- run: files -->                 lines begin with paths that exist
    <!-- run: example -->               not tested

Blocks of sh, console and python need none: they run in a copy of the repository with a tiny random model in
place of every other, after `make train` with it. Texts between <!-- numbers: NAME --> and <!-- end --> are
those that benchmarks/document_numbers.py makes of docs/numbers.json."""

import ast
import importlib
import importlib.util
import json
import re

import pytest
from conftest import ROOT
from documents import BLOCKS, DOCUMENTS, GUIDE, TEXTS, TOKENS, Block, Sandbox, named
from list_messages import Messages

from sft.cli import InputError
from sft.option_fields import default_of
from sft.options import EvaluationConfig, InferenceConfig, ReportConfig, TrainConfig, parse_options

SHOWN = {name: re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL) for name, text in TEXTS.items()}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("sft/**/*.py")]
CONFIGS = (ReportConfig, TrainConfig, InferenceConfig, EvaluationConfig)
# Of pip, uv, docker, pytest, torchrun, accelerate, vLLM, llama.cpp
OTHER_OPTIONS = set(
    "--no-deps --index-url --no-index --find-links --wheel-dir --torch-backend --python --no-dev --no-sync --rm "
    "--network --help --check --nproc_per_node --standalone --shutdown-timeout --multi_gpu --num_processes --cpu "
    "--served-model-name --enable-lora --max-lora-rank --lora-modules --outfile --outtype --parallel".split()
)
# Lines of a transcript whose numbers are the same for every model
SAME_FOR_ALL_MODELS = ("Writing:", "Data:", "Plan:", "Learning Rate:")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    made = Sandbox(tmp_path_factory.mktemp("documents"))
    yield made
    made.close()


# ------------------------------------------------------------------------------- outputs


def shape(line: str) -> str:
    """A line with its numbers replaced."""
    return re.sub(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "N", line.strip())


def assert_shown(shown: list[str], printed: str, with_figures: bool, where: str) -> None:
    """The lines shown are printed, in this order; lines are left out at will."""
    lines = iter([line.strip() for line in printed.split("\n")])
    for wanted in shown:
        same = str.strip if with_figures or wanted.startswith(SAME_FOR_ALL_MODELS) else shape
        is_there = wanted.strip() in ("", "...") or any(same(line) == same(wanted) for line in lines)
        assert is_there, f"{where}: not printed, or not in this order: {wanted}\n{printed}"


def assert_console(block: Block, sandbox: Sandbox) -> None:
    """Below each command stands all that it prints; of what a model wrote, what goes to standard error."""
    parts = re.split(r"^\$ .*(?:\\\n.*)*\n?", block.text, flags=re.MULTILINE)[1:]
    for command, part in zip(block.commands, parts, strict=True):
        out, said = sandbox.run(command)
        shown = part.strip().split("\n")
        where = f"{block.file}:{block.line}"
        if block.mark("model text") is not None:
            # But the time that it took, and warnings, which are about the tiny model's text
            messages = [line for line in said.split("\n") if not line.startswith(("warning", "("))]
            assert_shown(messages, part, False, where)
        else:
            assert_shown(shown, out + said, block.mark("figures") is not None, where)
            n_printed = len((out + said).strip().split("\n"))
            assert "..." in shown or len(shown) == n_printed, f"{where}: not all is shown\n{out}{said}"


def assert_files(block: Block, sandbox: Sandbox) -> None:
    """The names that lines begin with are files of the repository or of a run, or the code makes them."""
    code = "".join(file.read_text(encoding="utf-8") for file in SOURCES)
    for line in block.text.split("\n"):
        names = re.split(r"  +|, \.\.\.", line.strip())[0]
        for name in names.split(", "):
            parts = re.split(r"(?<![A-Za-z])N(?![A-Za-z])", name.rstrip("/"))
            found = [
                *sandbox.root.glob("*".join(parts)),
                *sandbox.root.glob(f"models/*/**/{'*'.join(parts)}"),
            ]
            assert found or all(part in code for part in parts), f"{block.file}:{block.line}: no {name}"


@pytest.mark.parametrize("block", **named(BLOCKS))
def test_block(block, sandbox):
    where = f"{block.file}:{block.line}"
    output = block.mark("output of ") or block.mark("figures of ")
    assert block.how, f"{where}: {block.language or 'no language'}: this cannot run and has no mark"
    if block.mark("example") is not None:
        return
    if output:
        if output not in sandbox.outputs:
            sandbox.reset()
            sandbox.run(output, status=int(block.mark("exit ") or 0))
        assert_shown(block.text.split("\n"), sandbox.outputs[output], bool(block.mark("figures of ")), where)
    elif block.mark("files") is not None:
        assert_files(block, sandbox)
    elif block.mark("no") is not None or block.mark("options") is not None:
        if block.language == "python":
            compile(block.text, where, "exec")
        for command in block.commands if block.language == "sh" else []:
            sandbox.parse(command)
    elif block.language == "python":
        sandbox.reset()
        (sandbox.root / "block.py").write_text(block.replaced(block.text))
        sandbox.run("python block.py")
    elif block.language == "console":
        sandbox.reset()
        assert_console(block, sandbox)
    else:
        sandbox.reset()
        *_, last = block.commands
        for command in block.commands:
            if command in sandbox.outputs:
                continue
            if block.mark("make -n") is not None:
                command = re.sub(r"^make\b", "make -n", command)
            if command not in sandbox.outputs:
                sandbox.run(command, status=int(block.mark("exit ") or 0) if command == last else 0)


# ------------------------------------------------------------------------------- what the texts name


def code_spans(file: str) -> list[str]:
    spans = [t for token in TOKENS[file] if token.type == "inline" for t in token.children]
    return [t.content for t in spans if t.type == "code_inline"]


def tables(file: str) -> list[list[list]]:
    """Each table as rows of cells; a cell is its inline token."""
    found = []
    for token in TOKENS[file]:
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level == 4 and found:
            found[-1][-1].append(token)
    return found


OPTIONS = {f"--{name}" for config in CONFIGS for name in config.__dataclass_fields__}


def options_of_the_code() -> set[str]:
    names = set(OPTIONS)
    for file in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]:
        names |= set(re.findall(r'"(--\w+)"', file.read_text(encoding="utf-8")))
    return names | OTHER_OPTIONS


@pytest.mark.parametrize("file", DOCUMENTS)
def test_options_exist(file):
    named_options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", SHOWN[file]))
    assert named_options <= options_of_the_code()


def takes(config, words: list[str]) -> bool:
    try:
        parse_options(config, "", words)
    except InputError as error:
        return "has no effect without" in error.problem
    return True


@pytest.mark.parametrize("file", DOCUMENTS)
def test_values_of_options_are_taken(file):
    """Those in the text, such as `--lr_scheduler constant`, by one of the scripts."""
    for span in code_spans(file):
        words = span.split()
        names = {word for word in words if word.startswith("--")}
        is_example = re.search(r"\b[A-Z]+\b|\||\.\.\.|=", span)
        if is_example or not names or not names <= OPTIONS or not span.startswith("--"):
            continue
        assert len(words) == 1 or any(takes(config, words) for config in CONFIGS), span


@pytest.mark.parametrize("file", DOCUMENTS)
def test_commands_in_the_text_parse(file, sandbox):
    for span in code_spans(file):
        if re.match(r"(\S*python|accelerate|torchrun)\b.* ?\w+\.py\b", span):
            sandbox.parse(span)
        if target := re.match(r"make (?:[A-Z]+=\S+ )*([a-z]\w*)", span):
            sandbox.run(f"make -n {target[1]}")


@pytest.mark.parametrize("file", DOCUMENTS)
def test_paths_exist(file):
    paths = set(
        re.findall(r"(?<![\w/.-])(?:sft|tests|benchmarks|docs|phase1_data)/[\w./*-]*[\w/*]", SHOWN[file])
    )
    paths |= set(
        re.findall(r"(?<![\w/.-])(?:requirements_\w+\.txt|\w+\.md|sft_\w+\.py)(?![\w/])", SHOWN[file])
    )
    missing = {path for path in paths if not list(ROOT.glob(path.rstrip("/")))}
    assert not missing - {"SKILL.md"}


@pytest.mark.parametrize("file", DOCUMENTS)
def test_names_in_the_code_exist(file):
    """sft.grounding.sentences.split_sentences; `build_template` in `sft/data/prompt.py`."""
    for name in set(re.findall(r"\bsft(?:\.[a-z_]\w*)+", SHOWN[file])):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)
    for name, path in re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", SHOWN[file]):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_every_module_is_listed():
    for path in ROOT.glob("sft/**/*.py"):
        if path.name != "__init__.py":
            assert path.relative_to(ROOT).as_posix() in SHOWN["CONTRIBUTING.md"], path


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS)
def test_links_lead_somewhere(file):
    tokens = [t for token in TOKENS[file] if token.type == "inline" for t in token.children]
    links = [t.attrs.get("href") or t.attrs.get("src") for t in tokens if t.type in ("link_open", "image")]
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_sections_exist():
    numbers = set(re.findall(r"^## (\d+)\.", SHOWN[GUIDE], re.MULTILINE))
    texts = [*SHOWN.values(), *(file.read_text(encoding="utf-8") for file in SOURCES)]
    mentioned = {number for text in texts for number in re.findall(r"\bsection\s+(\d+)", text)}
    assert mentioned <= numbers


# ------------------------------------------------------------------------------- tables


def is_default(cell: str, default) -> bool:
    """Whether a cell begins with an option's default."""
    if default is False:
        return cell.startswith("off")
    if isinstance(default, int | float):
        return float(cell.split()[0].replace(",", "").rstrip(",;")) == default
    return cell.startswith(" ".join(default) if isinstance(default, list) else default)


@pytest.mark.parametrize("file", DOCUMENTS)
def test_defaults_in_tables_are_the_parsers(file):
    for header, *rows in tables(file):
        if [cell.content for cell in header[:2]] != ["option", "default"]:
            continue
        for option, default, *_ in rows:
            name = re.match(r"`--(\w+)", option.content)[1]
            fields = [c.__dataclass_fields__[name] for c in CONFIGS if name in c.__dataclass_fields__]
            cell = default.content.replace("`", "")
            defaults = [value for value in map(default_of, fields) if value is not None]
            assert not defaults or any(is_default(cell, value) for value in defaults), f"--{name}: {cell}"


def messages_of_the_code() -> list[str]:
    found = []
    for file in SOURCES:
        reader = Messages()
        reader.visit(ast.parse(file.read_text(encoding="utf-8")))
        found += [text for _, _, text in reader.found]
    return found


def said_by(message: str, part: str) -> bool:
    """Whether words of a document are in a message; one of them may be what its {…} stands for."""
    words = part.split(" ")
    ways = [" ".join([*words[:i], "{…}", *words[i + 1 :]]) for i in range(len(words)) if len(words) > 1]
    return any(way in message for way in [part, *ways])


@pytest.mark.parametrize("file", DOCUMENTS)
def test_messages_in_tables_are_in_the_code(file):
    """Each part between placeholders (..., N, M) stands in a message."""
    messages = messages_of_the_code()
    for header, *rows in tables(file):
        if not header[0].content.startswith("message"):
            continue
        for cell, *_ in rows:
            for shown in [t.content for t in cell.children if t.type == "code_inline"]:
                parts = [part.strip() for part in re.split(r"\.\.\.|\b[A-Z]\b", shown)]
                assert all(any(said_by(m, part) for m in messages) for part in parts), shown


# ------------------------------------------------------------------------------- numbers


def test_figures_are_those_of_numbers_json():
    from benchmarks import document_numbers

    numbers = json.loads((ROOT / "docs" / "numbers.json").read_text(encoding="utf-8"))
    for file in document_numbers.DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        assert document_numbers.with_numbers(text, numbers) == text, f"{file}: run make numbers"


def test_numbers_are_measured_and_shown(sandbox):
    """One preset; the other sections are made in the same way."""
    sandbox.reset()
    readme = sandbox.root / "README.md"
    readme.write_text(f"{TEXTS['README.md']}\n<!-- numbers: presets -->\n\nnone\n<!-- end -->\n")
    wanted = "losses evaluation presets/phase1/quick"
    command = f"python benchmarks/document_numbers.py --only {wanted}"
    sandbox.run(command, small=("train", "validation", "test"))
    numbers = json.loads((sandbox.root / "docs" / "numbers.json").read_text())
    assert set(wanted.split()) <= set(numbers)
    shown = readme.read_text()
    assert f"| {numbers['losses']['untrained_val_loss']:.4f}, " in shown
    assert f"| phase1, quick | {numbers['presets/phase1/quick']['untrained_val_loss']:.4f} |" in shown


if __name__ == "__main__":
    for listed in BLOCKS:
        print(f"{listed.file}:{listed.line}: {listed.language or 'text'}: {listed.how}")
