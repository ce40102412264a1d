# ikd_retinanet.py without random flipping: Tables 2 and 3 compare augmentations on top of nothing else.
_base_ = "./ikd_retinanet.py"
train_pipeline = [step for step in _base_.train_pipeline if step["type"] != "RandomFlip"]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
