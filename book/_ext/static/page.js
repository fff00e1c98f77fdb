// The theme's two buttons that came with inline handlers: those need a hole in the page's Content-Security-Policy.
document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-page-action]")?.dataset.pageAction;
  if (action === "full-screen") toggleFullScreen();
  if (action === "print") print();
});
