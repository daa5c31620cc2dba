"""A demo in the browser, which `examples/space` runs and `push --space` publishes. Needs gradio."""
