// Where the conversation is scrolled to.

const scroller = document.getElementById("scroller");

function atEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

export function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

/** Do something that makes the conversation longer; whoever looks at its end goes on to look at its end. */
export function following(act) {
  const follow = atEnd();
  act();
  if (follow) toEnd();
}
