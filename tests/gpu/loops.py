"""The share of multiply-adds in the loop over keys, from the listings of compilers.

That loop is taken to be the outermost one with the most multiply-adds. Each instruction in it counts once, however often
an inner loop runs it, so shares of one kernel compare, and shares of different kernels do so only roughly.
"""
import re


def share(instructions, loops):
    """`instructions`: True for each multiply-add, False for each other one; `loops`: first and last of each."""
    best = (0, None)
    outermost = [one for one in loops
                 if not any(other != one and other[0] <= one[0] and one[1] <= other[1] for other in loops)]
    for first, last in outermost:
        inside = instructions[first:last + 1]
        if sum(inside) > best[0]:
            best = (sum(inside), sum(inside) / len(inside))
    return best[1]


AMD_FMA = re.compile(r"v_(pk_)?(dual_)?(fma|fmac|mac|mad|fmamk|fmaak)_?(legacy_)?f32|v_dual_(fmac|fmamk|fmaak)")


def amd(text):
    """ACO's: labels `BB1:`, branches to them; on RDNA3 `a :: b` is two instructions."""
    instructions, labels, branches = [], {}, []
    for line in text.splitlines():
        label = re.match(r"(BB\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = re.match(r"\s+([a-z]\w+)(.*)", line)
        if not found:
            continue
        operation, rest = found[1], found[2].split(";")[0]
        if operation.startswith(("s_branch", "s_cbranch")):
            branches.append((len(instructions), rest.split()[0]))
        instructions.append(bool(AMD_FMA.match(operation)))
        if "::" in rest:
            instructions.append(bool(AMD_FMA.match(rest.split("::")[1].split()[0])))
    last = {}
    for at, label in branches:
        first = labels.get(label)
        if first is not None and first <= at:
            last[first] = max(at, last.get(first, 0))
    return share(instructions, list(last.items()))


def nvidia(text):
    """NAK's: `block 7 L2 [6, 9] -> {`, with the blocks that it is entered from; a later one closes a loop."""
    instructions, blocks = [], []
    for line in text.splitlines():
        head = re.match(r"\s*block\S*\s+(\d+)\s+\S+\s+\[([^\]]*)\]", line)
        if head:
            blocks.append((len(instructions), [int(other) for other in head[2].split(",") if other.strip()]))
            continue
        body = line.split("//")[0].strip()
        if not blocks or not body or body.startswith("}"):
            continue
        words = [word for word in (body.split("=", 1)[1] if "=" in body else body).split() if not word.startswith("@")]
        instructions.append(bool(words) and words[0].split(".")[0] == "ffma")
    ends = [first for first, _ in blocks[1:]] + [len(instructions)]
    loops = [(first, ends[max(entered)] - 1) for at, (first, entered) in enumerate(blocks)
             if entered and max(entered) >= at]
    return share(instructions, loops)


def intel(text):
    """The generator's: `LABEL3:`, and `while` that jumps back to it."""
    instructions, labels, loops = [], {}, []
    for line in text.splitlines():
        label = re.match(r"\s*(LABEL\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = re.match(r"\s*(?:\([^)]*\)\s*)?([a-z][a-z0-9_]*)[.a-z0-9_]*(\(|\s)", line)
        if not found:
            continue
        if found[1] == "while":
            to = re.search(r"JIP:\s*(LABEL\d+)", line)
            if to and labels.get(to[1], len(instructions)) < len(instructions):
                loops.append((labels[to[1]], len(instructions)))
        instructions.append(found[1] == "mad")
    return share(instructions, loops)
