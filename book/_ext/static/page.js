// The theme's two buttons that came with inline handlers: those need a hole in the page's Content-Security-Policy.
document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-page-action]")?.dataset.pageAction;
  if (action === "full-screen") toggleFullScreen();
  if (action === "print") print();
});

// A page that was opened from disk may not read others to quote them: the search lists what it found without.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// Paper is light and has no folds to open; afterwards the page is as it was.
(function () {
  const root = document.documentElement, paper = matchMedia("print");
  let before = null;
  function lay() {
    if (before) return;
    const folded = [...document.querySelectorAll("details:not([open])")];
    before = { theme: root.dataset.theme, folded };
    root.dataset.theme = "light";
    for (const fold of folded) fold.open = true;
  }
  function restore() {
    if (!before) return;
    root.dataset.theme = before.theme;
    for (const fold of before.folded) fold.open = false;
    before = null;
  }
  addEventListener("beforeprint", lay);
  addEventListener("afterprint", restore);
  paper.addEventListener("change", () => (paper.matches ? lay() : restore()));
})();
