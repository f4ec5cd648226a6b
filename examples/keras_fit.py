"""Keras: one callback in `fit`, on whatever backend KERAS_BACKEND names."""

import keras
from sklearn.datasets import load_digits

import gradwatch as gw

keras.utils.set_random_seed(0)
digits = load_digits()
x = digits.images[..., None].astype("float32") / 16.0
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
model.compile(
    keras.optimizers.SGD(0.05, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

watch = gw.keras.GradWatch(run_dir="runs/keras", actions=[gw.SkipStep(), gw.Clip(max_norm=5.0)])
model.fit(x, digits.target, batch_size=64, epochs=2, verbose=0, callbacks=[watch])

run = gw.load("runs/keras")
print(run.summary())
run.report("keras.html")
