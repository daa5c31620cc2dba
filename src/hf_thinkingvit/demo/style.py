"""How the page looks."""

from html import escape


STYLE = """
#image img { width: 100%; height: 100%; object-fit: contain; }
#samples .gallery { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(52px, 1fr)); }
#samples .gallery button, #samples .gallery button * { width: 100%; height: auto; min-width: 0; aspect-ratio: 1; }
.tv-verdict { font-size: 1.15rem; line-height: 1.5; margin-bottom: .5rem; }
.tv-verdict strong { color: var(--body-text-color); }
.tv-small { font-size: .85rem; color: var(--body-text-color); opacity: .8; }
.tv-bar { height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden; }
.tv-bar { margin: .2rem 0; }
.tv-bar > div { height: 100%; border-radius: 5px; background: #0072B2; }
.tv-cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); margin: .75rem 0; }
.tv-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .75rem; min-width: 0; }
.tv-card.tv-accepted { border: 2px solid #009E73; padding: calc(.75rem - 1px); }
.tv-card.tv-unused { opacity: .7; }
.tv-head { display: flex; justify-content: space-between; gap: .5rem; font-weight: 600; }
.tv-badge { font-size: .8rem; border-radius: 4px; padding: .05rem .4rem; white-space: nowrap; font-weight: 400; }
.tv-accepted .tv-badge { background: #009E73; color: #fff; }
.tv-label { display: flex; justify-content: space-between; gap: .5rem; margin-top: .35rem; font-size: .9rem; }
.tv-label span:first-child { overflow-wrap: anywhere; }
.tv-pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.tv-pictures figure { margin: 0; min-width: 0; }
.tv-pictures img { width: 100%; max-width: 640px; border-radius: 6px; }
.tv-chip { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
.tv-legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin-top: .4rem; }
.tv-ramp { height: 10px; border-radius: 3px; max-width: 640px; }
.tv-ends { display: flex; justify-content: space-between; max-width: 640px; }
"""


def error_html(error: Exception) -> str:
    """In the place of an answer."""
    return f'<div class="tv-verdict">{escape(str(error))}</div>'
