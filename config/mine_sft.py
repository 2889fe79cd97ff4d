"""Your own dialogues: steps and rates are chosen for the set and its base model.

    python prepare.py chat FOLDER
    python sft.py config/mine_sft.py
"""
out_dir = "out/mine_sft"
dataset = "chat"
size = "auto"
