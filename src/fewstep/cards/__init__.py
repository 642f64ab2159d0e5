"""Model cards, and what they are written from: training records, carbon emissions and licences."""
