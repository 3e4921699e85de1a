// Distinct stacks, and the trees that flame graphs draw of them. A tree is made as far as somebody looks at it.

// How wide a stack is: by the time that it took, or by how often it was called.
const WEIGHTS = ['time', 'calls'];

class Stacks {
  // A stack is a number; it stands behind its caller's.
  constructor(count, bytes) {
    const numbers = new Numbers(bytes);
    const column = (Kind) => Kind.from({ length: count }, () => numbers.next());
    this.count = count;
    this.callers = column(Int32Array).map((distance, at) => distance === 0 ? -1 : at - distance);
    this.functions = column(Uint32Array);
    this.calls = column(Float64Array);
    this.own = { time: column(Float64Array), calls: this.calls };
    this.total = {};
    for (const weight of WEIGHTS) {
      const total = this.own[weight].slice();
      for (let at = count - 1; at >= 0; at--) if (this.callers[at] >= 0) total[this.callers[at]] += total[at];
      this.total[weight] = total;
    }
    // Callees as lists: the first one of each, and the next one of the same caller.
    this.firstCallee = new Int32Array(count).fill(-1);
    this.nextCallee = new Int32Array(count).fill(-1);
    this.roots = [];
    for (let at = count - 1; at >= 0; at--) {
      const caller = this.callers[at];
      if (caller < 0) {
        this.roots.unshift(at);
      } else {
        this.nextCallee[at] = this.firstCallee[caller];
        this.firstCallee[caller] = at;
      }
    }
  }

  // Stacks whose function is this, and in which it is not a caller of itself.
  outermost(index) {
    const found = [];
    // Whether a stack or one of its callers has the function.
    const within = new Uint8Array(this.count);
    for (let at = 0; at < this.count; at++) {
      const isWithin = this.callers[at] >= 0 && within[this.callers[at]] === 1;
      if (this.functions[at] === index && !isWithin) found.push(at);
      within[at] = isWithin || this.functions[at] === index ? 1 : 0;
    }
    return found;
  }

  // Who called a function, and whom it called: [function, calls, time], the longest first. Its calls of itself are left out.
  neighbours(index) {
    const [callers, callees] = [new Map(), new Map()];
    const add = (sums, key, calls, time) => {
      const sum = sums.get(key) ?? [key, 0, 0];
      sum[1] += calls;
      sum[2] += time;
      sums.set(key, sum);
    };
    for (const at of this.outermost(index)) {
      const caller = this.callers[at];
      add(callers, caller < 0 ? null : this.functions[caller], this.calls[at], this.total.time[at]);
    }
    for (let at = 0; at < this.count; at++) {
      const caller = this.callers[at];
      if (caller >= 0 && this.functions[caller] === index && this.functions[at] !== index) add(callees, this.functions[at], this.calls[at], this.total.time[at]);
    }
    const sorted = (sums) => [...sums.values()].sort((one, other) => other[2] - one[2] || other[1] - one[1]);
    return { callers: sorted(callers), callees: sorted(callees) };
  }

  // All calls, from the outermost ones down.
  topDown(weight) {
    return new Tree(this, weight, 'down').root(this.roots);
  }

  // From the functions that ran themselves, up to their callers.
  inverted(weight) {
    const own = this.own[weight];
    const parts = [];
    for (let at = 0; at < this.count; at++) if (own[at] > 0) parts.push(at);
    return new Tree(this, weight, 'up').root(parts, parts.map((at) => own[at]));
  }

  // A function's callers and callees: two trees whose roots are the function.
  butterfly(index, weight) {
    const parts = this.outermost(index);
    const up = new Tree(this, weight, 'up').node(null, index, parts, parts.map((at) => this.total[weight][at]));
    const down = new Tree(this, weight, 'down').node(null, index, parts);
    return { up, down };
  }
}

// Makes nodes: stacks that look alike from where one looks, merged.
class Tree {
  constructor(stacks, weight, direction) {
    this.stacks = stacks;
    this.weight = weight;
    this.isDown = direction === 'down';
  }

  // The node above all others, which has no function.
  root(parts, values) {
    const root = { parent: null, function: null, weight: 0, calls: 0, parts: [], values: null, children: null, tree: this };
    root.children = this.grouped(root, parts, values);
    for (const child of root.children) {
      root.weight += child.weight;
      root.calls += child.calls;
    }
    return root;
  }

  // Going down, a part is a stack, whose whole time counts. Going up, parts are callers of stacks, and what counts are the stacks' values.
  node(parent, index, parts, values) {
    const { stacks, weight } = this;
    let [sum, calls] = [0, 0];
    for (let at = 0; at < parts.length; at++) {
      sum += this.isDown ? stacks.total[weight][parts[at]] : values[at];
      calls += stacks.calls[parts[at]];
    }
    return { parent, function: index, weight: sum, calls, parts, values, children: null, tree: this };
  }

  // Nodes by the functions of some stacks, the widest first.
  grouped(parent, parts, values) {
    const groups = new Map();
    parts.forEach((part, at) => {
      const index = this.stacks.functions[part];
      let group = groups.get(index);
      if (group === undefined) groups.set(index, group = [[], []]);
      group[0].push(part);
      if (values) group[1].push(values[at]);
    });
    const nodes = [...groups].map(([index, [parts, values]]) => this.node(parent, index, parts, values));
    return nodes.sort((one, other) => other.weight - one.weight || one.function - other.function);
  }

  childrenOf(node) {
    if (node.children === null) {
      const { stacks } = this;
      const [parts, values] = [[], []];
      node.parts.forEach((part, at) => {
        if (this.isDown) {
          for (let callee = stacks.firstCallee[part]; callee >= 0; callee = stacks.nextCallee[callee]) parts.push(callee);
        } else if (stacks.callers[part] >= 0) {
          parts.push(stacks.callers[part]);
          values.push(node.values[at]);
        }
      });
      node.children = this.grouped(node, parts, this.isDown ? null : values);
    }
    return node.children;
  }
}
