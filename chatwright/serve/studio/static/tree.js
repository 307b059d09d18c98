// The conversation that is open: a tree of turns, and the branch of it that is shown.

/** A turn has id, parent, role, content, model, finish_reason, tokens, seconds, dropped, has_probabilities. */
export const chat = { id: null, title: "", leaf: null, turns: new Map() };

export function load({ id, title, leaf, turns }) {
  Object.assign(chat, { id, title, leaf, turns: new Map(turns.map((turn) => [turn.id, turn])) });
}

export function clearChat() {
  load({ id: null, title: "", leaf: null, turns: [] });
}

/** Put a turn into the tree, or what is new about it. */
export function put(turn) {
  chat.turns.set(turn.id, { ...chat.turns.get(turn.id), ...turn });
  return chat.turns.get(turn.id);
}

/** Take a turn out that came to nothing. */
export function drop(id, leaf) {
  chat.turns.delete(id);
  chat.leaf = leaf;
}

/** The turns that are shown, the first one first. */
export function branch() {
  const turns = [];
  for (let turn = chat.turns.get(chat.leaf); turn; turn = chat.turns.get(turn.parent)) turns.unshift(turn);
  return turns;
}

/** The versions of a turn, itself among them, in the order in which they were made. */
export function versions({ parent }) {
  return [...chat.turns.values()].filter((turn) => turn.parent === parent).sort((one, other) => one.id - other.id);
}

/** The end of the branch through `turn` that was made last. */
export function newestLeaf(turn) {
  for (;;) {
    const children = [...chat.turns.values()].filter((child) => child.parent === turn.id);
    if (!children.length) return turn;
    turn = children.reduce((newest, child) => (child.id > newest.id ? child : newest));
  }
}
