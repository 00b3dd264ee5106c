// Every two seconds, while the page is looked at: ask for it again and show what has changed.
"use strict";

const live = document.getElementById("live");
const stale = document.getElementById("stale");

function boxes(part) {
  return [...part.querySelectorAll("input[type=checkbox]")];
}

function show(next) {
  const chosen = new Map(boxes(live).map((box) => [box.value, box.checked]));
  const focused = document.activeElement?.value;
  for (const box of boxes(next)) {
    if (chosen.has(box.value)) box.checked = chosen.get(box.value);
  }
  for (const part of next.querySelectorAll("details")) {
    part.open = Boolean(document.getElementById(part.id)?.open);
  }
  if (next.innerHTML === live.innerHTML) return;
  // An image that is the same stays where it is, so that it does not flicker.
  const drawn = new Map([...live.querySelectorAll("img")].map((image) => [image.src, image]));
  for (const image of next.querySelectorAll("img")) {
    const same = drawn.get(new URL(image.getAttribute("src"), location.href).href);
    if (same) image.replaceWith(same);
  }
  live.replaceChildren(...document.adoptNode(next).childNodes);
  boxes(live).find((box) => box.value === focused)?.focus();
}

async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      show(page.getElementById("live"));
      stale.hidden = true;
    } catch {
      stale.hidden = false;
    }
  }
  setTimeout(refresh, 2000);
}

setTimeout(refresh, 2000);
