"""The share of multiply-adds in the loop over keys, from the listings of compilers.

The loop is the outermost one with the most multiply-adds. How often the loops inside it run is not in a listing; `trips`
says it, one number for each, in their order. Where it does not, they are taken to run ten times, as compilers guess.
"""
import collections
import re

TIMES = 10


def share(instructions, loops, trips):
    """`instructions`: True for each multiply-add, False for each other one; `loops`: the places in it of each loop."""
    loops = [set(loop) for loop in loops]
    best = (0, None)
    for loop in loops:
        if any(loop < other for other in loops):
            continue
        inside = [other for other in loops if other < loop]
        outermost = sorted((one for one in inside if not any(one < other for other in inside)), key=min)
        times = dict(enumerate(trips)) if len(trips) == len(outermost) else {}
        weight = collections.Counter(dict.fromkeys(loop, 1))
        for one in inside:
            times_of_one = times.get(outermost.index(one), TIMES) if one in outermost else TIMES
            for at in one:
                weight[at] *= times_of_one
        adds = sum(weight[at] for at in loop if instructions[at])
        if adds > best[0]:
            best = (adds, adds / sum(weight.values()))
    return best[1]


AMD_FMA = re.compile(r"v_(pk_)?(dual_)?(fma|fmac|mac|mad|fmamk|fmaak)_?(legacy_)?f32|v_dual_(fmac|fmamk|fmaak)")


def amd(text, trips):
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
    return share(instructions, [range(first, end + 1) for first, end in last.items()], trips)


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


def nvidia(text, trips):
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
                                for loop in natural_loops(entered)], trips)


def intel(text, trips):
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
    return share(instructions, loops, trips)
