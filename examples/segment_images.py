"""
Segment the images of a folder in sliding windows, each of which leaves at its own stage:

    python examples/segment_images.py --model MODEL --dataset FOLDER --output-dir outputs/segmented --threshold 0.5

The same as `hf-thinkingvit segment` (`--help` lists all options). In Python, `SlidingWindowSegmenter` of
`hf_thinkingvit.inference` does the work.
"""

from hf_thinkingvit.commands.segment import main


if __name__ == "__main__":
    main()
