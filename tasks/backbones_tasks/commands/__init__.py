"""The commands `backbones fit | validate | test | predict | compare | export | share`, a file each."""
