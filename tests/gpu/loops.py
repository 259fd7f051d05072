"""The share of multiply-adds in the loop over keys, from the listings of compilers.

How often a loop runs is not in a listing, so each loop is taken to run ten times whenever the one around it does, as
compilers themselves guess. Of the outermost loops, that with the most multiply-adds is taken.
"""
import collections
import re

TIMES = 10


def share(instructions, loops):
    """`instructions`: True for each multiply-add, False for each other one; `loops`: the places in it of each loop."""
    loops = [set(loop) for loop in loops]
    depths = collections.Counter(at for loop in loops for at in loop)
    best = (0, None)
    for loop in loops:
        if not any(loop < other for other in loops):
            adds = sum(TIMES ** depths[at] for at in loop if instructions[at])
            if adds > best[0]:
                best = (adds, adds / sum(TIMES ** depths[at] for at in loop))
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
    return share(instructions, [range(first, end + 1) for first, end in last.items()])


def natural_loops(entered):
    """The blocks of each loop, by the blocks that each block is entered from; block 0 is the first."""
    every = set(range(len(entered)))
    dominators = [{0}] + [every] * (len(entered) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(entered)):
            over = [dominators[other] for other in entered[block]]
            new = (set.intersection(*over) if over else set()) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    loops = {}
    for head in range(len(entered)):
        todo = [tail for tail in entered[head] if head in dominators[tail]]
        if todo:
            body = {head}
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += entered[block]
            loops[head] = body
    return list(loops.values())


def nvidia(text):
    """NAK's: `block 7 L2 [6, 9] -> {`, with the blocks that it is entered from."""
    instructions, firsts, entered = [], [], []
    for line in text.splitlines():
        head = re.match(r"\s*block\S*\s+\d+\s+\S+\s+\[([^\]]*)\]", line)
        if head:
            firsts.append(len(instructions))
            entered.append([int(other) for other in head[1].split(",") if other.strip()])
            continue
        body = line.split("//")[0].strip()
        if not firsts or not body or body.startswith("}"):
            continue
        words = [word for word in (body.split("=", 1)[1] if "=" in body else body).split() if not word.startswith("@")]
        instructions.append(bool(words) and words[0].split(".")[0] == "ffma")
    firsts.append(len(instructions))
    return share(instructions, [{at for block in loop for at in range(firsts[block], firsts[block + 1])}
                                for loop in natural_loops(entered)])


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
                loops.append(range(labels[to[1]], len(instructions) + 1))
        instructions.append(found[1] == "mad")
    return share(instructions, loops)
