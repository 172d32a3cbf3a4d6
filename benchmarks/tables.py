"""Write the tables of the READMEs from results/*.json, so that no table can drift.

    python benchmarks/tables.py           write them
    python benchmarks/tables.py --check   exit 2 if one of them is not what the files say

A table stands between <!-- table NAME --> and <!-- end -->.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import checkpoint
import evaluate
from benchmarks import throughput_imagenet
from benchmarks.accuracy import runs_of
from benchmarks.load_test import LOADS, SHIPPED
from errors import ArgumentParser, UserError, run_script
from flags import as_flags, differences, fill_in, parse_arguments
from presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "README.vi.md", ROOT / "benchmarks" / "README.md",
         ROOT / "examples" / "README.md")
PRESETS_IN_WORDS = {  # in the order of the table
    "best": "MNIST, the highest accuracy", "tiny": "MNIST, at most 0.1 million parameters",
    "original": "MNIST, the settings that this project began with", "smnist": "MNIST, pixel by pixel",
    "psmnist": "MNIST, pixel by pixel in a random order", "speedrun": "MNIST, in seconds",
    "gpu": "MNIST, on a GPU", "default": "MNIST, on a laptop's CPU",
}
VIETNAMESE = {  # the words of README.vi.md's tables; the longer before those that they contain
    "None is measured yet.": "Chưa đo preset nào.", "| flags | what it is |": "| cờ | là gì |",
    "a seed trains for": "một hạt giống huấn luyện", " at once": " cùng lúc",
    " more ended in NaN": " nữa kết thúc bằng NaN", " seeds, ": " hạt giống, ", " seed, ": " hạt giống, ",
    " seed)": " hạt giống)", "made by": "tạo bởi", "| model |": "| mô hình |", "parameters": "tham số",
    "the highest accuracy": "độ chính xác cao nhất", "at most 0.1 million": "nhiều nhất 0.1 triệu",
    "the settings that this project began with": "các thiết lập lúc dự án bắt đầu",
    "pixel by pixel": "từng điểm ảnh một", "in a random order": "theo một thứ tự ngẫu nhiên",
    "in seconds": "trong vài giây", "on a GPU": "trên một GPU",
    "on a laptop's CPU": "trên CPU của máy xách tay",
    "test accuracy": "độ chính xác kiểm tra", "an epoch takes": "một epoch mất", " seeds)": " hạt giống)",
    "Median µs, forward / backward": "Trung vị µs, tiến / lùi", "the aims are for": "mục tiêu là cho",
    "copy bandwidth": "băng thông sao chép", "times faster than mambapy": "nhanh hơn mambapy (lần)",
    "(batch, length, channels, states)": "(batch, độ dài, kênh, trạng thái)",
    "with `cpu_settings`": "với `cpu_settings`", "| without |": "| không có |",
    "forward + backward": "tiến + lùi", "| forward |": "| tiến |", "training step": "bước huấn luyện",
    ", if a scan took no time": ", nếu phép quét không tốn thời gian",
    "| command |": "| lệnh |", "| task |": "| phép tính |", "| settings |": "| thiết lập |",
    "| floor |": "| sàn |", "| measured |": "| đo được |", "| aim |": "| mục tiêu |", "| on |": "| trên |",
    "rows": "hàng", "7×7 tokens": "7×7 token", "14×14 tokens": "14×14 token", "cores": "lõi",
    "high resolution": "độ phân giải cao", "language": "ngôn ngữ", "| long |": "| dài |",
    "the small trained model that comes along, on them": "mô hình nhỏ đã huấn luyện có sẵn, trên các ảnh đó",
    "on MNIST's test images": "trên ảnh kiểm tra của MNIST",
    "a training of one epoch,": "một lần huấn luyện một epoch,",
    ", forward and backward,": ", tiến và lùi,", "| ours ": "| của chúng tôi ", " tokens × ": " token × ",
    " through ": " qua ", "layers of width": "lớp rộng", "layers, width": "lớp, rộng",
    "Tokens × batch; forward and backward": "Token × batch; tiến và lùi",
    "Attention by PyTorch's flash kernels or, with a c, by cuDNN's, where these took less time.":
    "Attention bằng kernel flash của PyTorch hoặc, với chữ c, của cuDNN, ở nơi chúng nhanh hơn.",
    "peak MiB": "MiB nhiều nhất", "| exponent |": "| số mũ |", "compiled": "biên dịch",
    "On ": "Trên ", "an H100": "một H100",
}


def main() -> None:
    parser = ArgumentParser(description="Write the tables of the READMEs from results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table differs")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(page, text)
        if check and filled != text:
            raise UserError(f"{page.relative_to(ROOT)} differs from results/; run: "
                            "python benchmarks/tables.py")
        if not check:
            page.write_text(filled, encoding="utf-8")


def fill(page: Path, text: str) -> str:
    """A page's text with every table made anew, in its language."""
    def made(match: re.Match) -> str:
        table = TABLES[match[1]]()
        if page.name == "README.vi.md":
            for english, vietnamese in VIETNAMESE.items():
                table = table.replace(english, vietnamese)
        return f"<!-- table {match[1]} -->\n{table}\n<!-- end -->"
    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", made, text, flags=re.S)


def result(name: str) -> dict:
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} is missing; measure it anew, see benchmarks/README.md, or fetch it by git")
    return json.loads(path.read_text(encoding="utf-8"))


def machine(facts: dict) -> str:
    chip = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} cores"
    return f"{chip}; PyTorch {facts['torch']}"


def machines(found: dict) -> str:
    """Those that the seeds of a file of accuracy.py were trained on; the first is that of the times."""
    facts = [found["machine"], *(run["machine"] for run in runs_of(found))]
    return " / ".join(dict.fromkeys(map(machine, facts)))


def training(*names: str) -> str:
    lines = ["| command | test accuracy | an epoch takes | on |", "|---|---|---|---|"]
    for name in names:
        found = result(name)
        command = " ".join(["python train_mamba.py", *flags_today(found["settings"], found["arguments"])])
        lines.append(f"| `{command}` | {in_percent(found)} | {found['seconds_an_epoch']:.3g} s | "
                     f"{machines(found)} |")
    return "\n".join(lines)


def in_percent(found: dict) -> str:
    """Mean and deviation over the seeds that came to their end, and their number."""
    mean, std = found["test_accuracy"]["mean"], found["test_accuracy"]["std"]
    percent = "–" if mean is None else f"{100 * mean:.2f}" + (f" ± {100 * std:.2f} %" if std else " %")
    ended = sum(not run.get("nan") for run in found["runs"])
    seeds = f"{ended} seed" + ("s" if ended != 1 else "")
    nan = f", {found['nan_runs']} more ended in NaN" if found.get("nan_runs") else ""
    return f"{percent} ({seeds}{nan})"


def accuracies() -> str:
    """A row for each preset that was measured."""
    lines = []
    for preset, what in PRESETS_IN_WORDS.items():
        if not (ROOT / "results" / f"accuracy-{preset}.json").exists():
            continue
        found = result(f"accuracy-{preset}")
        ended = [run["training_seconds"] for run in runs_of(found) if not run["nan"]
                 and run["jobs"] == found["jobs"]  # or the mean would be of two things
                 and machine(run["machine"]) == machine(found["machine"])]
        seconds = f"{statistics.mean(ended):,.0f} s" if ended else "–"
        seconds += f", {found['jobs']} at once" if found["jobs"] > 1 else ""
        flags = " ".join(flags_today(found["settings"], found["arguments"]))
        lines.append(f"| `{flags}` | {what} | {found['parameters']:,} | "
                     f"{in_percent(found)} | {seconds} | {machines(found)} |")
    if not lines:
        return "None is measured yet."
    return "\n".join(["| flags | what it is | parameters | test accuracy | a seed trains for | on |",
                      "|---|---|---|---|---|---|", *lines])


def headline() -> str:
    """The numbers that README begins with: accuracies, and the longest sequence measured."""
    best, contents, epoch = result("accuracy-best"), checkpoint.load(SHIPPED), result("mnist-1-epoch")
    compared = result("compare_architectures_cuda")
    longest, batch = max((row["tokens"], row["batch"]) for row in compared["rows"])
    rows = sorted((row for row in compared["rows"] if row["tokens"] == longest and row["median_ms"]),
                  key=lambda row: -row["median_ms"])
    fastest = {row["network"]: f"{row['median_ms']:.3g} ms, {row['peak_mib']:.0f} MiB" for row in rows}
    return "\n".join([
        "| | |", "|---|---|",
        f"| `--preset best`, on MNIST's test images | {in_percent(best)} |",
        f"| the small trained model that comes along, on them | "
        f"{100 * contents['metrics']['test_accuracy']:.2f} % |",
        f"| a training of one epoch, `python train_mamba.py --epochs 1` | {in_percent(epoch)} |",
        f"| {longest:,} tokens × {batch} through {compared['depth']} layers of width {compared['width']}, "
        f"forward and backward, {compared['machine']['gpu']} | ours {fastest['mamba']}; "
        f"Transformer {fastest['transformer']}; LSTM {fastest['lstm']} |"])


def shipped() -> str:
    """The model in the box and the command that made it, as its own settings say."""
    contents = checkpoint.load(SHIPPED)
    command = " ".join(["python train_mamba.py", *shortest_flags(contents["settings"])])
    parameters = sum(weight.numel() for weight in evaluate.rebuild(contents, "cpu").parameters())
    return "\n".join(["| model | made by | parameters | test accuracy |", "|---|---|---|---|",
                      f"| `{SHIPPED.relative_to(ROOT).as_posix()}` | `{command}` | {parameters:,} | "
                      f"{100 * contents['metrics']['test_accuracy']:.2f} % |"])


def shortest_flags(saved: dict) -> list[str]:
    """What to type today for a run's settings; the nearest preset may have another name by now."""
    lines = []
    for preset in PRESETS:
        with contextlib.suppress(UserError):
            lines.append(flags_today(saved, ["--preset", preset]))
    return min(lines, key=len, default=None) or flags_today(saved, [])  # which tells why there is none


def flags_today(saved: dict, given: list[str]) -> list[str]:
    """The flags `given`, and what must be typed beside them for the `saved` settings: presets change.

    Raises UserError where that cannot be said: a flag is gone, or would have to give the value None.
    """
    saved = {name: value for name, value in saved.items() if name != "preset"}  # there may be no such today
    kept = vars(parse_arguments([], saved))
    settings = parse_arguments(given)
    fill_in(settings)
    typed = {name: there for name, (there, _) in differences(kept, settings).items() if name != "preset"}
    if unsaid := [name for name, value in typed.items() if value is None]:
        raise UserError(f"what ran without {unsaid[0]} cannot be said by {' '.join(given)}, which sets it")
    return [*given, *(word.replace("=", " ", 1) for word in as_flags(typed))]


def scan_on_cpu() -> str:
    """Ours against mambapy, with our memory settings for both and without them for either."""
    files = {"with `cpu_settings`": result("bench_scan_cpu"), "without": result("bench_scan_cpu_plain")}
    lines = [f"On {machine(files['without']['machine'])}.", "",
             "| task | (batch, length, channels, states) | settings | times faster than mambapy | aim |",
             "|---|---|---|---|---|"]
    for settings, found in files.items():
        for row in found["rows"]:
            if row["implementation"] in ("numba", "no scan"):
                what = ", if a scan took no time" if row["implementation"] == "no scan" else ""
                aim = "" if row["target"] is None else f"{row['target']:.0f}×"
                lines.append(f"| {row['task']}{what} | ({row['shape'].replace(',', ', ')}) | {settings} | "
                             f"{row['ratio']:.1f}× | {aim} |")
    return "\n".join(lines)


def scan_on_cuda(name: str) -> str:
    found = result(name)
    table = found["table"]
    bandwidth = table["copy_bytes_per_second"] / 1e12
    official = table["mamba_ssm_us"]  # None where mamba_ssm was not installed
    lines = [f"On {machine(found['machine'])}, copy bandwidth {bandwidth:.2f} TB/s. "
             "Median µs, forward / backward; the aims are for an H100.", "",
             "| | (batch, length, channels, states) | floor | measured | aim |"
             + (" mamba_ssm |" if official else ""), "|---|---|---|---|---|" + ("---|" if official else "")]
    for row in table["rows"]:
        times = [row[key] for key in ("floor_us", "median_us", "target_us")]
        if official:
            times.append(official[row["name"]])
        cells = (" / ".join(f"{value:.0f}" for value in pair) for pair in times)
        lines.append(f"| {row['name']} | ({', '.join(map(str, row['shape']))}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def architectures() -> str:
    """Time and memory of a training step: a row for each network, a column for each length."""
    found = result("compare_architectures_cuda")
    sizes = sorted({(row["tokens"], row["batch"]) for row in found["rows"]})
    lines = [f"On {machine(found['machine'])}; {found['depth']} layers, width {found['width']}, "
             f"{found['precision']}. Tokens × batch; forward and backward, ms / peak MiB. Attention by "
             "PyTorch's flash kernels or, with a c, by cuDNN's, where these took less time.", "",
             "| | parameters | " + " | ".join(f"{tokens} × {batch}" for tokens, batch in sizes)
             + " | exponent |", "|---" * (len(sizes) + 3) + "|"]
    for network, variant in dict.fromkeys((row["network"], row["variant"]) for row in found["rows"]):
        name = f"{network}, {variant}"
        cells = {(row["tokens"], row["batch"]): "–" if row["median_ms"] is None else
                 f"{row['median_ms']:.3g} / {row['peak_mib']:.0f}"
                 f"{' c' if row.get('attention') == 'cudnn' else ''}" for row in found["rows"]
                 if (row["network"], row["variant"]) == (network, variant)}
        exponent = found["exponents"].get(name)
        lines.append(f"| {name} | {found['parameters'][network]:,} | "
                     + " | ".join(cells.get(size, "–") for size in sizes)
                     + f" | {'–' if exponent is None else f'{exponent:.2f}'} |")
    return "\n".join(lines)


def crash_test() -> str:
    found = result("crash_test")
    lines = [f"On {machine(found['machine'])}.", "",
             "| dataset | kills | survived | weights equal | epochs lost | points doubled |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {row['dataset']} | {row['kills']} | {row['survived']} | {row['equal']} | "
              f"{row['epochs_lost']} | {row['doubled']} |" for row in found["rows"]]
    return "\n".join(lines)


def load_test() -> str:
    found = result("load_test")
    lines = [f"On {machine(found['machine'])}.", "",
             "| load | times | temporary files | processes | open files | MiB at first | MiB at last |",
             "|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        lines.append(f"| {LOADS[row['load']]} | {row['count']:,} | {row['temporary_files']} | "
                     f"{row['processes']} | {row['open_files']} | {row['first_mib']:.0f} | "
                     f"{row['last_mib']:.0f} |")
    return "\n".join(lines)


def imagenet() -> str:
    """Throughput and memory at the size of ImageNet: a row for each network, a column for each size."""
    found = result("throughput_imagenet")
    sizes = sorted({(row["image_size"], row["batch_size"]) for row in found["rows"]})
    lines = [f"On {machine(found['machine'])}; {found['precision']}. Forward and backward, images/s / peak "
             "MiB.", "", "| | parameters | "
             + " | ".join(f"{size}×{size}, batch {batch}" for size, batch in sizes) + " |",
             "|---" * (len(sizes) + 2) + "|"]
    for name in dict.fromkeys(throughput_imagenet.label(row) for row in found["rows"]):
        rows = {(row["image_size"], row["batch_size"]): row for row in found["rows"]
                if throughput_imagenet.label(row) == name}
        cells = [f"{row['images_per_second']:,.0f} / {row['peak_mib'] or 0:,.0f}"
                 if (row := rows.get(size)) and row["images_per_second"] else "–" for size in sizes]
        parameters = next(iter(rows.values()))["parameters"]
        lines.append(f"| {name} | {parameters:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spoken_digits() -> str:
    found = result("spoken-digits")
    seeds = len({run["seed"] for run in found["runs"]})
    lines = [f"Mean ± standard deviation over {seeds} seeds; {found['parameters']:,} parameters, "
             f"{found['steps']} steps; noise on pixels of 0 to 1: {found['image_noise']:g}, speech in noise: "
             f"{found['sound_noise_db']:g} dB. {found['clips']['train']:,} clips to train on, "
             f"{found['clips']['test']:,} of other voices to test.", "",
             "| given | test accuracy |", "|---|---|"]
    for inputs, title in (("image", "the image"), ("sound", "the sound"), ("both", "both")):
        accuracy = found["test_accuracy"][inputs]
        lines.append(f"| {title} | {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} % |")
    return "\n".join(lines)


TABLES = {"headline": headline, "training": lambda: training("mnist-1-epoch", "mnist-20-epochs", "mnist-gpu"),
          "states": lambda: training("mnist-1-epoch", "mnist-1-epoch-16"), "accuracy": accuracies,
          "shipped": shipped, "scan-cpu": scan_on_cpu, "scan-cuda": lambda: scan_on_cuda("bench_scan_cuda"),
          "scan-cuda-h200": lambda: scan_on_cuda("bench_scan_cuda_h200"), "architectures": architectures,
          "crash-test": crash_test, "load-test": load_test, "imagenet": imagenet,
          "spoken-digits": spoken_digits}

if __name__ == "__main__":
    run_script(main)
