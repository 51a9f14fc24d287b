"""
Pictures and pages of a run: what the population did, as a person can see it.

`measures` holds the mathematics and `survey` says what is measured of a population, on which examples; `figures` draws,
for the model card too; `gather` reads what a run has left, and `page` puts it on one page. `diagnostics` is the callback
that measures while a run trains. How members are trained, and where they live, is left to others. Nothing is imported
here: a card needs the pictures, and no torch.
"""
