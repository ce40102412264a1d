# Table 3, row 3: FGD with copy-paste instead of flipping. Paper: 40.6.
# The paper does not say the parameters. Ours: mmdet's CopyPaste with its own defaults, in all 24 epochs. It pastes between
# images of one size, so the resized ones are padded to 1333x1333; masks are loaded for it alone.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
load_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="Pad", size=(1333, 1333), pad_val=dict(img=(103.53, 116.28, 123.675))),
]
train_pipeline = [dict(type="CopyPaste"), dict(type="PackDetInputs")]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="MultiImageMixDataset",
        dataset=dict(_base_.train_dataloader.dataset, pipeline=load_pipeline),
        pipeline=train_pipeline,
    )
)
model = dict(adv=None, augment=None, stop_at=None)
