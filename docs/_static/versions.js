// The published site has a folder for each version, and versions.json beside them (dev/site.py).
document.addEventListener("DOMContentLoaded", async () => {
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const here = root.pathname.split("/").at(-2);
  const answer = await fetch(new URL("../versions.json", root)).catch(() => null);
  if (!answer?.ok) return;
  for (const place of document.querySelectorAll(".versions")) {
    const select = place.querySelector("select");
    for (const name of await answer.clone().json()) select.add(new Option(name, name, false, name === here));
    select.addEventListener("change", async () => {
      const there = new URL(`../${select.value}/`, root);
      const page = new URL(location.pathname.slice(root.pathname.length), there);
      const found = await fetch(page, { method: "HEAD" }).catch(() => null);
      location.assign(found?.ok ? page : there);
    });
    place.hidden = false;
  }
});
