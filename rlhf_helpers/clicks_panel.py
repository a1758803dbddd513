"""Where a person makes the choices of `clicks.Clicks`: a panel in the notebook, or plain text."""

from collections.abc import Callable
from html import escape
from types import ModuleType

from IPython.display import Javascript, display

from rlhf_helpers.clicks import Clicks
from rlhf_helpers.text import readable
from rlhf_helpers.validation import checked

LABELS = {"first": "1 is better", "second": "2 is better", "neither": "Cannot tell"}
LABELS |= {"undo": "Undo"}
CHOICES = {"1": "first", "2": "second", "0": None}
FASTEST = 0.3  # seconds in which nobody reads two answers: the second half of a double click
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.45;font-size:1.1em"
FRAME = "border:1px solid;border-radius:6px;padding:8px 12px;margin:2px 0"
CARD = {"flex": "1 1 260px", "min_width": "0", "margin": "0 2px 8px"}
CARD |= {"justify_content": "space-between"}  # buttons in line also below short answers
WRAP = {"flex_flow": "row wrap", "width": "100%"}  # one below the other on a phone
APART = {"width": "100%", "justify_content": "space-between"}
WHOLE = {"max_width": "900px", "padding": "4px"}
HINT = "Keys, after a click into this panel: ← or 1, → or 2, ↓ or 0 for “cannot tell”, u to undo."
# ipywidgets has no events of keys: this turns them into clicks on the panel's own buttons. It
# listens before JupyterLab does, for which an arrow moves to another cell.
KEYS = """
if (!window.rlhfClicks) {
  window.rlhfClicks = true;
  const panelOf = (event) => event.target.closest && event.target.closest(".rlhf-clicks");
  const buttons = {ArrowLeft: "first", 1: "first", ArrowRight: "second", 2: "second",
                   ArrowDown: "neither", 0: "neither", u: "undo"};
  window.addEventListener("keydown", (event) => {
    const panel = panelOf(event), name = buttons[event.key];
    if (!panel || !name || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat) panel.querySelector(".rlhf-" + name).click();
  }, true);
  window.addEventListener("click", (event) => {
    const panel = panelOf(event);
    if (!panel || !event.detail) return;  // 0: by a key, which keeps its place
    panel.tabIndex = -1;
    panel.focus({preventScroll: true});
  });
}
"""


@checked
def show(clicks: Clicks) -> None:
    """Show the panel: two answers as cards, a button below each, and the keys.

    Each choice is saved before the next two answers come. To go on after a restart, or from another
    notebook, run the cell again. Nothing in it tells which model wrote an answer.

    Raises:
        ImportError: without ipywidgets; `ask` needs none.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            "the panel needs ipywidgets: pip install ipywidgets, then restart JupyterLab; or "
            "answer in plain text: clicks_panel.ask(clicks)"
        ) from error
    display(Panel(clicks, ipywidgets).box, Javascript(KEYS))


class Panel:
    """The panel's widgets, and what pressing a button does; `box` holds them."""

    def __init__(self, clicks: Clicks, widgets: ModuleType) -> None:
        self.clicks = clicks
        self.progress, self.prompt, self.message, *self.answers = (widgets.HTML() for _ in range(5))
        self.buttons = {name: widgets.Button(description=LABELS[name]) for name in LABELS}
        for name, button in self.buttons.items():
            button.layout = {"width": "auto", "height": "44px"}  # a thumb's width
            button.add_class(f"rlhf-{name}")
            button.on_click(lambda _, name=name: self.press(name))
        first, second, neither, undo = self.buttons.values()
        pairs = zip(self.answers, (first, second), strict=True)
        cards = [widgets.VBox(pair, layout=CARD) for pair in pairs]
        self.question = widgets.VBox([self.prompt, widgets.HBox(cards, layout=WRAP)])
        self.hint = widgets.HTML(f'<div style="line-height:1.45">{HINT}</div>')
        below = widgets.HBox([neither, undo], layout=APART)
        rows = [self.progress, self.question, self.message, below, self.hint]
        self.box = widgets.VBox(rows, layout=WHOLE).add_class("rlhf-clicks")
        self.refresh()

    def refresh(self) -> None:
        """Show the next question, or that all are answered."""
        question = self.clicks.show_next()
        self.progress.value = _progress(self.clicks)
        self.message.value = "" if question else _text("\n".join(_summary(self.clicks)))
        for widget in (self.question, self.buttons["neither"], self.hint):
            widget.layout.display = "" if question else "none"
        for name, button in self.buttons.items():
            button.disabled = not (self.clicks.rows if name == "undo" else question)
        if question:
            self.prompt.value = _text(readable(question.prompt), "font-weight:bold")
            for number, answer in enumerate((question.first, question.second)):
                self.answers[number].value = _text(f"{number + 1}:  {answer}", FRAME)

    def press(self, name: str) -> None:
        """What the button of this name does."""
        if self.clicks.seconds_shown() < FASTEST:
            return
        try:
            if name == "undo":
                self.clicks.undo()
            else:
                self.clicks.record(None if name == "neither" else name)
        except (OSError, RuntimeError, ValueError) as error:
            self.message.value = _text(f"Not saved: {error}")
        else:
            self.refresh()


@checked
def ask(clicks: Clicks, read: Callable[[str], str] = input) -> None:
    """Ask in plain text, for places without widgets.

    Args:
        read: shows a line and returns what is typed: 1, 2, 0 for "cannot tell", u to undo, q to
            stop.
    """
    while question := clicks.show_next():
        print(f"\n{clicks.progress()}\n\n{readable(question.prompt)}\n")
        print(f"  1: {question.first}\n\n  2: {question.second}\n")
        try:
            key = read("1 or 2 is better, 0 cannot tell, u undo, q stop: ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            key = "q"
        if key == "q":
            break
        if key in CHOICES:
            clicks.record(CHOICES[key])
        elif key != "u":
            print(f"{key!r} is none of 1, 2, 0, u and q")
        elif not clicks.undo():
            print("there is nothing to undo")
    print("\n".join(_summary(clicks)))


def _summary(clicks: Clicks) -> list[str]:
    same, twice = clicks.agreement()
    lines = [clicks.progress() + (f"; saved in {clicks.path}" if clicks.path else "")]
    if twice:
        lines.append(f"You agreed with yourself in {same} of {twice} pairs decided twice.")
    return lines + [f"Look again: {bias}." for bias in (clicks.one_sided(),) if bias]


def _progress(clicks: Clicks) -> str:
    done, of = len(clicks.rows), len(clicks.questions)
    bar = f'<progress value="{done}" max="{of}" style="width:100%"></progress>'
    return f'<div style="line-height:1.45">{bar}<br>{escape(clicks.progress())}</div>'


def _text(text: str, style: str = "") -> str:
    """Text as HTML: what it has of markup is shown, not obeyed."""
    return f'<div style="{TEXT};{style}">{escape(text)}</div>'
