// MathJax sets all formulas of a page in one task and blocks the page meanwhile: set them one by one.
window.MathJax = {
  ...window.MathJax,
  startup: {
    typeset: false,
    ready() {
      MathJax.startup.defaultReady();
      MathJax.startup.promise = MathJax.startup.promise.then(async () => {
        for (const formula of document.querySelectorAll(".math")) {
          await MathJax.typesetPromise([formula]);
          await new Promise((next) => { setTimeout(next); });
        }
      });
    },
  },
};
