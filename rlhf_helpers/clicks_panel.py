"""Where a person makes the choices of `clicks.Clicks`: a panel in the notebook, or plain text."""

from collections.abc import Callable
from html import escape

from IPython.display import Javascript, display

from rlhf_helpers.clicks import Clicks
from rlhf_helpers.text import readable

CHOICES = {"1": "first", "2": "second", "0": None}
FASTEST = 0.3  # seconds in which nobody reads two answers: the second half of a double click
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.45;font-size:1.1em"
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


def show(clicks: Clicks) -> None:
    """Show the panel: two answers as cards, a button below each, and the keys.

    Each choice is saved before the next two answers come. To go on after a restart, or from another
    notebook, run the cell again. Nothing in it tells which model wrote an answer.

    Raises:
        ImportError: without ipywidgets; `ask` needs none.
    """
    display(panel(clicks), Javascript(KEYS))


def panel(clicks: Clicks) -> object:
    """The panel alone, without the keys; for a layout of one's own.

    Returns:
        An ipywidgets box.
    """
    try:
        import ipywidgets as widgets
    except ImportError as error:
        raise ImportError(
            "the panel needs ipywidgets: pip install ipywidgets, then restart JupyterLab; or "
            "answer in plain text: clicks_panel.ask(clicks)"
        ) from error

    progress, prompt, message = widgets.HTML(), widgets.HTML(), widgets.HTML()
    hint = widgets.HTML(f'<div style="line-height:1.45">{HINT}</div>')
    answers = {"first": widgets.HTML(), "second": widgets.HTML()}
    labels = {"first": "1 is better", "second": "2 is better", "neither": "Cannot tell"}
    buttons = {
        name: widgets.Button(description=label, layout={"width": "auto", "height": "44px"})
        for name, label in (labels | {"undo": "Undo"}).items()
    }
    cards = [
        widgets.VBox(
            [answer, buttons[side]],
            layout={
                "flex": "1 1 260px",
                "min_width": "0",
                "justify_content": "space-between",
                "margin": "0 2px 8px",
            },
        )
        for side, answer in answers.items()
    ]
    row = {"flex_flow": "row wrap", "width": "100%"}
    choice = widgets.VBox([prompt, widgets.HBox(cards, layout=row)])

    def refresh() -> None:
        question = clicks.show_next()
        progress.value = _progress(clicks)
        message.value = "" if question else _done(clicks)
        for shown in (choice, buttons["neither"], hint):
            shown.layout.display = "" if question else "none"
        for name, button in buttons.items():
            button.disabled = not (clicks.rows if name == "undo" else question)
        if question:
            prompt.value = f'<div style="{TEXT}"><b>{escape(readable(question.prompt))}</b></div>'
            answers["first"].value = _card(1, question.first)
            answers["second"].value = _card(2, question.second)

    def pressed(name: str) -> None:
        if clicks.seconds_shown() < FASTEST:
            return
        try:
            if name == "undo":
                clicks.undo()
            else:
                clicks.record(None if name == "neither" else name)
        except (OSError, RuntimeError, ValueError) as error:
            message.value = (
                f'<div role="alert" style="{TEXT}">Not saved: {escape(str(error))}</div>'
            )
        else:
            refresh()

    for name, button in buttons.items():
        button.add_class(f"rlhf-{name}")
        button.on_click(lambda _, name=name: pressed(name))
    refresh()
    apart = {"width": "100%", "justify_content": "space-between"}
    below = widgets.HBox([buttons["neither"], buttons["undo"]], layout=apart)
    whole = {"max_width": "900px", "padding": "4px"}
    box = widgets.VBox([progress, choice, message, below, hint], layout=whole)
    return box.add_class("rlhf-clicks")


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


def _card(number: int, answer: str) -> str:
    frame = "border:1px solid;border-radius:6px;padding:8px 12px;margin:2px 0"
    return f'<div style="{TEXT};{frame}"><b>{number}</b>\n{escape(answer)}</div>'


def _done(clicks: Clicks) -> str:
    lines = "\n".join(map(escape, _summary(clicks)))
    return f'<div role="status" style="{TEXT}">{lines}</div>'
