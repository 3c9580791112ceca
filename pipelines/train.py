"""Train the model that a recipe describes: a shipped one by its name, or a TOML file of yours.

    mmvit train emoji_demo
    mmvit train my.toml --train.steps 100 --output runs/short

The recipe's `task` decides which script runs: classifier, generator, joint, clip, image-tokenizer or
pretraining. Any setting can be changed on the command line: --section.key value, lists as '["one", "two"]'.
`mmvit train RECIPE --settings` lists them all, `mmvit train --list` lists the shipped recipes, and `mmvit
copy RECIPE my.toml` gives you one to edit.

--resume continues a run bit for bit, from where Ctrl-C or SIGTERM stopped it, or from the last checkpoint
after a crash; RECIPE may then be the run folder.
"""

from mmvit.cli import run_script
from mmvit.recipes.command import recipe_command

main = recipe_command(__doc__)

if __name__ == "__main__":
    run_script(main)
