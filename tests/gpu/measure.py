#!/usr/bin/env python3
"""What the compilers of GPUs make of the kernels, compared with tests/gpu/table.tsv; ../../gpu-compilers calls it.

    measure.py TEXTS [--full] [--write] [GPU...]
"""
import collections
import concurrent.futures
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import loops

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "target/gpu"
INTEL = WORK / "intel"
TABLE = HERE / "table.tsv"
LIMITS = HERE / "limits.tsv"
PIPELINES = ROOT / "target/debug/examples/pipelines"
PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- ./gpu-compilers -->", "<!-- end -->"

SECONDS = 10  # of processor time for a text; on real seconds, a busy machine would fail
REAL_SECONDS = 300  # a compiler that waits for nothing
SAMPLE = 20  # of what is on record, one in so many is compiled all the same
WORSE = 0.005  # of a share, what rounding may take
COLUMNS = "gpu variant hash result subgroup registers spills fills scratch shared waves code seconds share".split()

Gpu = collections.namedtuple("Gpu", "name label kind driver shim environment every")
NVK = {"NVK_I_WANT_A_BROKEN_VULKAN_DRIVER": "1"}
# `kind`: whose default kernels it runs. `every`: whether it takes every variant, or the default kernels only.
GPUS = [
    Gpu("polaris10", "AMD Polaris 10 (GCN 4)", "amd", "radeon", "amdgpu", {"AMDGPU_GPU_ID": "polaris10"}, False),
    Gpu("navi21", "AMD Navi 21 (RDNA 2)", "amd", "radeon", "amdgpu", {"AMDGPU_GPU_ID": "navi21"}, True),
    Gpu("navi31", "AMD Navi 31 (RDNA 3)", "amd", "radeon", "amdgpu", {"AMDGPU_GPU_ID": "navi31"}, True),
    Gpu("gfx1201", "AMD gfx1201 (RDNA 4)", "amd", "radeon", "amdgpu", {"AMDGPU_GPU_ID": "gfx1201"}, False),
    Gpu("turing", "NVIDIA Turing (TU102)", "nvidia", "nouveau", "nouveau", {"NOUVEAU_CHIPSET": "162", **NVK}, False),
    Gpu("ampere", "NVIDIA Ampere (GA102)", "nvidia", "nouveau", "nouveau", {"NOUVEAU_CHIPSET": "172", **NVK}, True),
    Gpu("adreno740", "Qualcomm Adreno 740", "qualcomm", "freedreno", "freedreno", {"FD_GPU_ID": "740"}, True),
    Gpu("m1", "Apple M1", "apple", "asahi", "asahi", {}, True),
    Gpu("tgl", "Intel Tiger Lake (Xe-LP)", "intel", "intel", "intel", {"INTEL_STUB_GPU_PLATFORM": "tgl"}, True),
    Gpu("dg2", "Intel DG2 (Xe-HPG)", "intel", "intel", "intel", {"INTEL_STUB_GPU_PLATFORM": "dg2"}, False),
    Gpu("bmg", "Intel Battlemage (Xe2)", "intel", "intel", "intel", {"INTEL_STUB_GPU_PLATFORM": "bmg"}, False),
]

# What each driver calls the columns, and by what its number is multiplied.
STATISTICS = {
    "radeon": {
        "registers": ("VGPRs", 1), "spills": ("Spilled VGPRs", 1), "scratch": ("Scratch size", 1),
        "shared": ("LDS size", 1), "waves": ("Subgroups per SIMD", 1), "code": ("Code size", 1),
    },
    "nouveau": {
        "registers": ("Number of GPRs", 1), "spills": ("Spills to memory", 1), "fills": ("Fills from memory", 1),
        "scratch": ("SLM size", 1), "waves": ("Max warps/SM", 1), "code": ("Code size", 1),
    },
    "freedreno": {
        "registers": ("Registers used", 1), "spills": ("STP Count", 1), "fills": ("LDP Count", 1),
        "waves": ("Max Waves Per Core", 1), "code": ("Code size", 4),
    },
    "asahi": {
        "registers": ("GPRs", 1), "spills": ("Spills", 1), "fills": ("Fills", 1), "scratch": ("Scratch", 1),
        "waves": ("Threads", 1 / 32), "code": ("Code size", 1),
    },
    "intel": {
        "registers": ("Max live registers", 1), "spills": ("Spill Count", 1), "fills": ("Fill Count", 1),
        "scratch": ("Scratch Memory Size", 1), "shared": ("Workgroup Memory Size", 1),
    },
}
SHARES = {"radeon": loops.amd, "nouveau": loops.nvidia, "intel": loops.intel}


def on_fake_device(gpu, home, *command):
    """The command that runs `command` where the only device is a fake one of this GPU, and its environment."""
    libraries = WORK / "root/usr/lib/x86_64-linux-gnu"
    shim, path, drivers = libraries / f"lib{gpu.shim}_noop_drm_shim.so", str(libraries), WORK / "root"
    if gpu.driver == "intel":
        # Built here, and a driver of the same version.
        shim, drivers = INTEL / shim.name, INTEL / "root"
        path = f"{drivers}/usr/lib/x86_64-linux-gnu:{path}"
    environment = {
        "HOME": home,
        "XDG_RUNTIME_DIR": home,
        "MESA_SHADER_CACHE_DISABLE": "true",
        "VK_DRIVER_FILES": str(drivers / f"usr/share/vulkan/icd.d/{gpu.driver}_icd.json"),
        **gpu.environment,
    }
    return [libraries / "ld-linux-x86-64.so.2", "--library-path", path, "--preload", shim, *command], environment


def trips_of(name):
    """How often the loops inside the loop over keys run; see TiledParts in src/kernels/catalogue/flash.rs."""
    tile = re.match(r"flash_tiled\.rows(\d+)x\d+\.across(\d+)\.keys\d+\.dims(\d+)[a-z_]*x(\d+)", name)
    if not tile:
        return []
    rows, across, dim_k, dim_v = map(int, tile.groups())
    part4 = 4 if across == 16 or rows == 8 else 8
    at_once = 2 if dim_v / 4 > across else 1
    strips = -(-dim_v // (4 * across * at_once))
    return [-(-dim_k // (4 * part4))] + [across * at_once // part4] * strips


class Compiler:
    """A program that compiles one text after another on one GPU, started anew where it has died."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.folder = tempfile.TemporaryDirectory(prefix=f"attn-{gpu.name}-")
        self.process = None
        self.device = ""

    def start(self):
        command, environment = on_fake_device(self.gpu, self.folder.name, WORK / "compile", str(SECONDS), self.folder.name)
        self.errors = open(WORK / f"{self.gpu.name}.log", "a")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        env=environment, text=True, errors="replace")
        word, _, self.device = self.process.stdout.readline().rstrip("\n").partition("\t")
        if word != "device":
            self.stop()
            raise SystemExit(f"{self.gpu.label}: no device; see {self.errors.name}")

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def compile(self, path, with_share):
        """The columns of one text, but for gpu, variant and hash."""
        if not self.process:
            self.start()
        process = self.process
        timer = threading.Timer(REAL_SECONDS, process.kill)
        timer.start()
        row = dict.fromkeys(COLUMNS, "-")
        statistics = []
        try:
            process.stdin.write(f"{'+' if with_share else ''}{path}\n")
            process.stdin.flush()
            for line in process.stdout:
                word, *fields = line.rstrip("\n").split("\t")
                if word == "stat":
                    statistics.append(fields)
                elif word == "done":
                    row["result"] = "ok" if fields[0] == "0" else f"refused {fields[0]}"
                    row["seconds"] = f"{float(fields[1]) / 1000:.1f}"
                    break
        except BrokenPipeError:
            pass
        timer.cancel()
        if row["result"] == "-":
            self.process = None
            status = process.wait()
            over = status in (-signal.SIGPROF, -signal.SIGKILL)
            row["result"] = "time-out" if over else "crash"
        # A driver may compile for several subgroup sizes, and then runs the widest that does not spill more.
        if statistics:
            fields = max(statistics, key=lambda fields: int(fields[0]))
            row["subgroup"] = fields[0]
            found = dict(field.split("=", 1) for field in fields[1:])
            for column, (name, times) in STATISTICS[self.gpu.driver].items():
                if name in found:
                    row[column] = f"{float(found[name]) * times:.0f}"
            listing = pathlib.Path(self.folder.name, f"{path.name}.{fields[0]}.txt")
            if listing.exists():
                share = SHARES[self.gpu.driver](listing.read_text(errors="replace"), trips_of(path.name))
                row["share"] = "-" if share is None else f"{share:.3f}"
        for left in pathlib.Path(self.folder.name).glob("*.txt"):
            left.unlink()
        return row


def read_table():
    rows = {}
    if TABLE.exists():
        for line in TABLE.read_text().splitlines():
            if not line.startswith("#") and not line.startswith(COLUMNS[0] + "\t"):
                row = dict(zip(COLUMNS, line.split("\t")))
                rows[row["gpu"], row["variant"]] = row
    return rows


def version():
    """What makes the record void: other drivers."""
    installer = (HERE / "install").read_text()
    found = dict(re.findall(r"^(\w*version)=(\S+)$", installer, re.M))
    return f"# Mesa {found['version']}, Intel's {found['intel_version']}"


def write_table(rows):
    order = [gpu.name for gpu in GPUS]
    lines = [version(), "\t".join(COLUMNS)]
    for key in sorted(rows, key=lambda key: (key[1], order.index(key[0]))):
        lines.append("\t".join(rows[key][column] for column in COLUMNS))
    new = TABLE.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    new.replace(TABLE)


def number(text):
    return 0.0 if text == "-" else float(text)


def what_is_worse(row, before):
    """Words, or nothing."""
    if row["result"] != "ok":
        return "" if before and before["result"] == row["result"] else row["result"]
    if not before or before["result"] != "ok":
        return ""
    for column in ("spills", "fills"):
        if column == "spills" and number(row[column]) > number(before[column]):
            return f"{row[column]} registers are spilled, {before[column]} were"
    if before["share"] != "-" and number(row["share"]) < number(before["share"]) - WORSE:
        return f"{row['share']} of the instructions in the loop over keys are multiply-adds, {before['share']} were"
    return ""


def of_gpu(gpu, texts, defaults, rows, full, take):
    """Compiles what is not on record, and a sample of what is; hands each row to `take`, one at a time."""
    todo, seen = [], collections.Counter()
    for variant, (path, digest) in texts.items():
        kernel = variant.split("/")[0]
        before = rows.get((gpu.name, variant))
        is_known = before is not None and before["hash"] == digest and not full
        # A crash or a time-out costs the most, and says the least.
        is_sample = seen[kernel] % SAMPLE == 0 and not (is_known and before["result"] != "ok")
        seen[kernel] += 1
        if not is_known or is_sample:
            todo.append((variant, path, digest))
    free, lock, all_compilers = [], threading.Lock(), []

    def one(item):
        variant, path, digest = item
        with lock:
            if not free:
                all_compilers.append(Compiler(gpu))
                free.append(all_compilers[-1])
            compiler = free.pop()
        row = compiler.compile(path, variant in defaults and gpu.driver in SHARES)
        with lock:
            free.append(compiler)
            take({**row, "gpu": gpu.name, "variant": variant, "hash": digest})

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(one, todo):
            pass
    for compiler in all_compilers:
        compiler.stop()
        compiler.folder.cleanup()
    return len(todo), next((compiler.device for compiler in all_compilers if compiler.device), "")


def pages(rows, given, defaults):
    """The tables of docs/gpu.md. `given`: the kinds of GPUs that may be given each variant."""
    gpus = [gpu for gpu in GPUS if any(key[0] == gpu.name for key in rows)]
    out = ["| GPU | variants | that spill | refused, crashed | over 10 s | code, KB, most | processor time, s |",
           "|---|---:|---:|---:|---:|---:|---:|"]
    for gpu in gpus:
        of = [row for row in rows.values() if row["gpu"] == gpu.name and gpu.kind in given[row["variant"]]]
        count = lambda test: sum(1 for row in of if test(row))
        code = max(number(row["code"]) for row in of) / 1000
        over = count(lambda row: row["result"] == "time-out")
        out.append(
            f"| {gpu.label} | {len(of)} | {count(lambda row: number(row['spills']) > 0)} "
            f"| {count(lambda row: row['result'] not in ('ok', 'time-out'))} | {over} "
            f"| {f'{code:.0f}' if code else 'not told'} "
            f"| {sum(number(row['seconds']) for row in of) + SECONDS * over:.0f} |")

    def cells(title, cell, of=gpus, suffix=""):
        out.append("")
        out.append(f"| {title} | " + " | ".join(gpu.name for gpu in of) + " |")
        out.append("|---|" + "---:|" * len(of))
        for label in dict.fromkeys(label for label, _, _ in defaults):
            line = []
            for gpu in of:
                variant = next(variant for of, variant, kinds in defaults if of == label and gpu.kind in kinds)
                row = rows.get((gpu.name, variant + suffix))
                line.append("" if row is None else row["result"] if row["result"] != "ok" else cell(row))
            out.append(f"| {label} | " + " | ".join(line) + " |")

    cells("spilled registers", lambda row: row["spills"] + ("" if row["fills"] == "-" or row["spills"] == "0"
                                                            else "/" + row["fills"]))
    cells("registers, waves", lambda row: row["registers"] + ("" if row["waves"] == "-" else ", " + row["waves"]))
    percent = lambda row: "" if row["share"] == "-" else f"{100 * number(row['share']):.0f}"
    with_shares = [gpu for gpu in gpus if gpu.driver in SHARES]
    cells("share of multiply-adds, %", percent, with_shares)
    cells("the same without checks, %", percent, with_shares, "/unchecked")
    cells("code, KB", lambda row: f"{number(row['code']) / 1000:.1f}",
          [gpu for gpu in gpus if gpu.driver != "intel"])
    return "\n".join(out)


def limits_of(gpu):
    """What our own library, through wgpu, finds of a GPU, once it has created the pipelines of the benchmark shapes
    there; or what went wrong."""
    with tempfile.TemporaryDirectory() as home:
        command, environment = on_fake_device(gpu, home, PIPELINES)
        ran = subprocess.run(command, env={**environment, "WGPU_BACKEND": "vulkan"}, capture_output=True, text=True,
                             timeout=REAL_SECONDS)
    lines = ran.stdout.splitlines()
    if ran.returncode or len(lines) != 2:
        return None, f"{gpu.label}: no pipelines through wgpu: {ran.stderr.strip()[-300:]}"
    return lines[0].split("\t", 1)[1], f"{lines[0].split(chr(9))[0]} through wgpu: {lines[1]}"


def check_limits(gpus, write):
    header, *lines = LIMITS.read_text().splitlines()
    known = dict(line.split("\t", 1) for line in lines)
    bad = []
    for gpu in gpus:
        found, words = limits_of(gpu)
        print(words, file=sys.stderr)
        if found is None:
            bad.append(words)
        elif write:
            known[gpu.name] = found
        elif known.get(gpu.name) != found:
            bad.append(f"{gpu.label}: its limits are {found}, tests/gpu/limits.tsv says {known.get(gpu.name)}")
    if write:
        order = [gpu.name for gpu in GPUS]
        LIMITS.write_text("\n".join([header] + [f"{name}\t{known[name]}" for name in order if name in known]) + "\n")
    return bad


def check_page(written, write):
    if not PAGE.exists():
        return []
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{written}\n{END}{after}"
    if new == text:
        return []
    if write:
        PAGE.write_text(new)
        return []
    return ["the tables of docs/gpu.md are not those of tests/gpu/table.tsv: ./gpu-compilers --write renews them"]


def main():
    arguments = sys.argv[1:]
    full, write = "--full" in arguments, "--write" in arguments
    folder, *chosen = [argument for argument in arguments if not argument.startswith("--")]
    unknown = set(chosen) - {gpu.name for gpu in GPUS}
    if unknown:
        raise SystemExit(f"no GPU is called {', '.join(unknown)}; there are {', '.join(gpu.name for gpu in GPUS)}")
    texts = {}
    for path in sorted(pathlib.Path(folder).glob("*.spv")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        texts[path.name.removesuffix(".spv").replace(".", "/")] = (path, digest)
    lines = pathlib.Path(folder, "defaults.tsv").read_text().splitlines()
    natural = lambda label: [(int(word), "") if word.isdigit() else (0, word) for word in label.replace(",", " ,").split()]
    fields = (line.split("\t") for line in lines)
    defaults = sorted(((label, variant, kinds.split(",")) for label, variant, kinds in fields),
                      key=lambda default: natural(default[0]))

    lines = pathlib.Path(folder, "given.tsv").read_text().splitlines()
    given = collections.defaultdict(list, ((variant, kinds.split(",")) for variant, kinds in
                                           (line.split("\t") for line in lines)))

    rows = read_table()
    if TABLE.exists() and TABLE.read_text().splitlines()[0] != version():
        for row in rows.values():
            row["hash"] = "-"
    has_intel = (INTEL / "libintel_noop_drm_shim.so").exists()
    if not has_intel:
        print("Intel's GPUs are not to be had here: no fake kernel driver", file=sys.stderr)
    here = [gpu for gpu in GPUS if (not chosen or gpu.name in chosen) and (has_intel or gpu.driver != "intel")]
    bad, news = check_limits(here, write), []
    for gpu in here:
        began = time.monotonic()
        of_defaults = {variant: texts[variant] for _, variant, kinds in defaults if gpu.kind in kinds}
        if gpu.driver in SHARES:
            of_defaults |= {f"{variant}/unchecked": texts[f"{variant}/unchecked"] for variant in of_defaults}
        checked = {variant: text for variant, text in texts.items() if not variant.endswith("/unchecked")}
        ours = checked | of_defaults if gpu.every else of_defaults
        compared = collections.Counter()
        saved = [began]

        def take(row):
            key = gpu.name, row["variant"]
            before = rows.get(key)
            worse = what_is_worse(row, before)
            if worse:
                bad.append(f"{gpu.label}, {row['variant']}: {worse}")
            if before is None:
                news.append(f"{gpu.label}, {row['variant']}: new, {row['result']}, {row['spills']} spilled")
            compared["worse" if worse else "new" if before is None else "no worse"] += 1
            if write:
                # The seconds differ from run to run, what is compiled does not.
                same = before is not None and all(
                    before[column] == row[column] for column in COLUMNS if column != "seconds")
                rows[key] = before if same else row
                # A run that is broken off goes on from here.
                if time.monotonic() - saved[0] > 20:
                    saved[0] = time.monotonic()
                    write_table(rows)
            elif before is None or before["hash"] != row["hash"]:
                compared["not on record"] += 1
        count, device = of_gpu(gpu, ours, of_defaults, dict(rows), full, take)
        for key in [key for key in rows if key[0] == gpu.name and key[1] not in ours]:
            if write:
                del rows[key]
            else:
                compared["in the table, but no more"] += 1
        if write:
            write_table(rows)
        words = ", ".join(f"{n} {word}" for word, n in compared.items())
        print(f"{gpu.label}{f' ({device})' if device else ''}: {count} of {len(ours)} compiled in "
              f"{time.monotonic() - began:.0f} s: {words}", file=sys.stderr)
    for line in news[:20] if not write else []:
        print(line, file=sys.stderr)
    written = pages(rows, given, defaults)
    print(written)
    bad_page = check_page(written, write)
    if write and bad:
        print("recorded, although worse:", file=sys.stderr)
    for line in bad + bad_page:
        print(line, file=sys.stderr)
    if (bad and not write) or bad_page:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
