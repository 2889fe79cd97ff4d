"""Your own texts: model, steps and rates are chosen for the set, and printed with their reason.

    python prepare.py text FOLDER
    python pretrain.py config/mine.py
"""
out_dir = "out/mine"
dataset = "text"
size = "auto"
