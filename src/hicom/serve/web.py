"""A page to ask a model about a video, and to see what it cost and where the model looked."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: nothing is told to anyone

import gradio as gr

from .backends import Backend, Budget, Costs, sentence

logger = logging.getLogger(__name__)
History = list[dict[str, str]]
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto}
/* the editor would cut in the browser, with code from elsewhere */
#video button[aria-label="Trim video to selection"], #video button[aria-label="Reset video to initial value"] {
    display: none
}
.cost {font-size: 0.95em; line-height: 1.5}
.cost .track {background: rgba(128, 128, 128, 0.25); border-radius: 4px; height: 12px; overflow: hidden; margin: 4px 0}
.cost .bar {background: #d9480f; height: 100%; min-width: 2px}
.cost table {border-collapse: collapse; width: 100%}
.cost table, .cost tr, .cost td {border: none !important}
.cost td {padding: 1px 8px 1px 0; white-space: nowrap}
.cost td.wide {width: 100%}
.cost .caution {color: #d9480f}
"""


def create_page(backend: Backend, *, sample: Path | None = None, questions: Sequence[str] = ()) -> gr.Blocks:
    """Return the page; `launch` starts it.

    Args:
        backend: what answers.
        sample: a clip that is offered.
        questions: that are offered.
    """
    with gr.Blocks(title=f"hicom: {backend.name}", analytics_enabled=False) as page:
        history = gr.State([])  # turns about `about`
        about = gr.State(None)  # path of the video
        gr.Markdown(f"# {backend.name}\n{backend.about}")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                video = gr.Video(label="Video", sources=["upload"], elem_id="video", height=300, buttons=[])
                if sample is not None:
                    gr.Examples([[str(sample)]], [video], label="Sample clip")
                frames = gr.Slider(1, backend.max_frames, backend.num_frames, step=1, label="Frames", elem_id="frames")
                budget = gr.Slider(**budget_range(backend, backend.num_frames), step=1, elem_id="budget")
                plan = gr.Markdown(plan_text(backend, backend.num_frames, 0), elem_id="plan")
            with gr.Column(scale=7, min_width=360):
                talk = gr.Chatbot(label="Conversation", height=330, elem_id="talk", buttons=[])
                question = gr.Textbox(
                    placeholder="Ask about the video",
                    show_label=False,
                    submit_btn=True,
                    elem_id="question",
                    max_lines=4,
                )
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    clear = gr.Button("New conversation", size="sm", elem_id="clear")
                if questions:
                    gr.Examples([[each] for each in questions], [question], label="Questions")
        with gr.Row():
            with gr.Column(min_width=320):
                meter = gr.HTML(elem_id="meter")
            with gr.Column(min_width=320):
                times = gr.HTML(elem_id="times")
        gr.Markdown("### Where it looked", visible=backend.has_pictures)
        picture = gr.Image(
            show_label=False,
            type="pil",
            format="png",
            elem_id="picture",
            interactive=False,
            visible=backend.has_pictures,
            buttons=["fullscreen", "download"],
        )

        def ask(
            path: str | None, text: str, turns: History, last_path: str | None, num_frames: int, most: int
        ) -> Iterator[tuple[Any, ...]]:
            turns = turns if path == last_path else []

            def refuse(reason: str) -> tuple[Any, ...]:
                """Tell what is wrong and put everything back, the question into its field."""
                gr.Warning(html.escape(reason), title="No answer")
                return turns, turns, path, text, gr.skip(), gr.skip(), gr.skip()

            if not path:
                yield refuse("Choose a video first.")
                return
            if not text or not text.strip():
                yield refuse("Ask a question.")
                return
            asked: History = [*turns, {"role": "user", "content": text.strip()}]
            yield asked, asked, path, "", "", "", None
            try:
                for update in backend.reply(Path(path), asked, int(num_frames), int(most) or None):
                    whole = [*asked, {"role": "assistant", "content": update.text}]
                    cost, seconds = meter_html(update.costs, update.notes), times_html(update.costs)
                    yield whole, whole, path, "", cost, seconds, update.picture
            except (ValueError, OSError) as error:
                yield refuse(sentence(error))
            except Exception:
                logger.exception("a question failed")
                yield refuse("The model failed at this question; the log has more.")

        asking = question.submit(
            ask,
            [video, question, history, about, frames, budget],
            [talk, history, about, question, meter, times, picture],
            concurrency_limit=1,
            show_progress="minimal",
            api_visibility="private",
        )

        def change_frames(num_frames: int) -> tuple[Any, str]:
            return gr.Slider(**budget_range(backend, int(num_frames))), plan_text(backend, int(num_frames), 0)

        def nothing() -> tuple[Any, ...]:
            return [], [], "", "", None

        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        frames.release(change_frames, [frames], [budget, plan], **private)
        budget.change(lambda n, most: plan_text(backend, int(n), int(most)), [frames, budget], [plan], **private)
        emptied = [talk, history, meter, times, picture]
        for event in (clear.click, talk.clear):
            event(nothing, None, emptied, cancels=[asking], **private)

        def change_video(path: str | None, last_path: str | None) -> Any:
            # This may come after a quick question about the new video.
            return [gr.skip()] * len(emptied) if path is not None and path == last_path else nothing()

        video.change(change_video, [video, about], emptied, **private)
        stop.click(None, None, None, cancels=[asking], api_visibility="private")
    page.queue(api_open=False, max_size=64)
    return page


def launch(page: gr.Blocks, *, host: str, port: int, max_bytes: int, wait: bool = True) -> Any:
    """Show a page at an address; return gradio's server.

    Raises:
        OSError: the port is taken.
    """
    # Fonts by name alone: gradio's own would be fetched from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host,
        server_port=port,
        max_file_size=max_bytes,
        prevent_thread_lock=not wait,
        show_error=True,
        quiet=True,
        share=False,
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=CSS,
    )


def budget_range(backend: Backend, num_frames: int) -> dict[str, Any]:
    """Return the arguments of the budget's slider; 0 stands for the model's own window."""
    found = backend.budget(num_frames)
    text = "Most visual tokens (0: as trained)"
    if found is None:
        return {"minimum": 0, "maximum": 4096, "value": 0, "label": text}
    return {"minimum": 0, "maximum": found.most, "value": 0, "label": text}


def plan_text(backend: Backend, num_frames: int, most: int) -> str:
    """Return what a choice of frames and budget means."""
    found = backend.budget(num_frames)
    if found is None:
        return f"{num_frames} frames"
    if 0 < most < found.least:
        return f"{num_frames} frames need at least {found.least:,} visual tokens"
    return f"{num_frames} frames, {_budget(found, most)}"


def _budget(budget: Budget, most: int) -> str:
    if not most:
        return f"{budget.usual:,} visual tokens of {budget.most:,}"
    return f"at most {most:,} visual tokens of {budget.most:,}"


def meter_html(costs: Costs | None, notes: Sequence[str] = ()) -> str:
    """Return how many tokens an answer took, and what to know before it is believed."""
    if costs is None:
        return ""
    lines = []
    used, whole = costs.num_visual_tokens, costs.num_uncompressed_tokens
    if used and whole:
        fewer = f"{whole / used:.1f} times fewer"
        lines.append(f"<b>{used:,}</b> visual tokens of {whole:,} without compression ({fewer}){bar(used / whole)}")
    window = "" if costs.window is None else f" · window {' x '.join(map(str, costs.window))}"
    lines.append(f"prompt {costs.num_prompt_tokens:,} tokens · answer {costs.num_new_tokens:,} tokens{window}")
    for note in notes:
        text = re.sub("`(.*?)`", r"<code>\1</code>", html.escape(sentence(note)))
        lines.append(f'<span class="caution">{text}</span>')
    return f'<div class="cost">{"".join(f"<div>{line}</div>" for line in lines)}</div>'


def bar(share: float) -> str:
    """Return a bar that is full to a share of its length."""
    return f'<div class="track"><div class="bar" style="width: {min(100.0, 100 * share):.1f}%"></div></div>'


def times_html(costs: Costs | None) -> str:
    """Return how long each part took."""
    if costs is None or not costs.timings:
        return ""
    longest = max(costs.timings.values()) or 1.0
    rows = [
        f"<tr><td>{html.escape(part)}</td><td>{1000 * seconds:,.0f} ms</td>"
        f'<td class="wide">{bar(seconds / longest)}</td></tr>'
        for part, seconds in costs.timings.items()
    ]
    return f'<div class="cost"><table>{"".join(rows)}</table></div>'
