"""A page in the browser: images from captions, edits, captions and classes of images."""
