// Keeps what is marked as live up to date. Everything else works without scripts.
"use strict";

const live = document.getElementById("live");

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("live");
    // whoever reads in it, or has opened a part of it, keeps what is there
    const opened = live.querySelector("details[open]") || live.contains(document.activeElement);
    if (fresh && !opened) live.replaceChildren(...fresh.childNodes);
  } catch {
    // the daemon is away: what is shown stays, and the next try may find it
  }
}

if (live) setInterval(refresh, 1000 * Number(live.dataset.refresh));
